"""Drafters and rules that a server must be set up for, over HTTP by the real openai client."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.deployments.conftest import MODEL, AppFactory, ServedApp

PROMPT = "the quick brown fox jumps over the lazy dog"


def complete(app: ServedApp, speculation: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text, and what usage.magicdec says."""
    answer = app.client().completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=40,
        extra_body={"speculation": speculation, "ignore_eos": True},
        **fields,
    )
    assert answer.usage is not None and answer.usage.model_extra is not None
    return answer.choices[0].text, answer.usage.model_extra["magicdec"]


def test_a_draft_model_serves_beside_the_drafters_of_the_target(
    run_app: AppFactory, tiny_model_dir: Path
) -> None:
    """The target's own weights as the draft model, with all of its KV: nothing is rejected."""
    own = {"drafter": "draft_model", "draft_model": str(tiny_model_dir), "draft_model_window": None}
    app = run_app(speculation=own)
    for fields in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
        plain, _ = complete(app, "off", **fields)
        text, counts = complete(app, None, **fields)
        assert text == plain
        assert counts["drafter"] == "draft_model"
        assert counts["accepted"] == counts["drafted"] > 2 * counts["rounds"]
        text, counts = complete(app, {"drafter": "snapkv"}, **fields)
        assert (text, counts["drafter"]) == (plain, "snapkv")


def test_optimal_coupling_serves_greedy_as_plain_and_samples_to_the_end(
    run_app: AppFactory,
) -> None:
    app = run_app(speculation={"verification": "optimal_coupling"})
    assert complete(app, None, temperature=0.0)[0] == complete(app, "off", temperature=0.0)[0]

    def sampled(seed: int) -> tuple[str, dict[str, Any]]:
        return complete(app, None, temperature=1.0, seed=seed)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(sampled, range(8)))
    assert len({text for text, _ in answers}) == 8
    assert all(counts["rounds"] + counts["accepted"] == 39 for _, counts in answers)
    assert sum(counts["accepted"] for _, counts in answers) > 0
