"""A request's own wish for its draft, by the real openai client: what it changes and what not."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.deployments.conftest import MODEL, AppFactory, ServedApp

PROMPT = "the quick brown fox jumps over the lazy dog"
STREAMING = {"drafter": "streaming", "draft_length": 2, "draft_budget": 16}


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    return run_app()


def complete(app: ServedApp, speculation: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text, and what usage.magicdec says."""
    answer = app.client().completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=40,
        extra_body={"speculation": speculation, "ignore_eos": True, **fields},
    )
    return counted(answer.choices[0].text, answer.usage)


def counted(text: str | None, usage: Any) -> tuple[str, dict[str, Any]]:
    assert text is not None
    counts: dict[str, Any] = usage.model_extra["magicdec"]
    return text, counts


def test_off_is_plain_decoding(app: ServedApp) -> None:
    _, counts = complete(app, "off")
    assert (counts["drafted"], counts["accepted"]) == (0, 0)
    assert counts["rounds"] == 39  # the first token is the prefill's
    assert counts["mean_acceptance_length"] == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_override_changes_the_draft_and_not_the_text(app: ServedApp, temperature: float) -> None:
    fields = {"temperature": temperature, "seed": 5}
    plain, _ = complete(app, "off", **fields)
    text, counts = complete(app, STREAMING, **fields)
    assert counts["drafted"] >= counts["accepted"] > 0
    # At most two drafts a round: the last rounds may have room for fewer.
    assert counts["drafted"] <= 2 * counts["rounds"]
    assert text == plain
    assert complete(app, None, **fields)[0] == plain


@pytest.mark.parametrize("drafter", ["snapkv", "recycled", "ngram"])
def test_every_drafter_gives_the_plain_text(app: ServedApp, drafter: str) -> None:
    plain, _ = complete(app, "off", temperature=0)
    text, counts = complete(app, {"drafter": drafter}, temperature=0)
    assert counts["drafted"] > 0
    assert counts["drafter"] == drafter
    assert text == plain


def test_auto_and_null_leave_the_draft_to_the_server(app: ServedApp) -> None:
    server = complete(app, None, temperature=0)
    assert server[1]["drafted"] > 2 * server[1]["rounds"]  # the server drafts three
    for speculation in ({}, {"drafter": "auto"}, {"drafter": None, "draft_length": None}):
        assert complete(app, speculation, temperature=0) == server


def test_a_share_is_a_budget_too(app: ServedApp) -> None:
    text, counts = complete(app, {"draft_budget": 0.5}, temperature=0)
    assert counts["drafted"] > 0
    assert text == complete(app, "off", temperature=0)[0]


def test_neighbours_in_a_batch_may_wish_differently(app: ServedApp) -> None:
    wishes = ["off", STREAMING, {"draft_length": 7}, {"draft_length": 0}] * 2
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = list(pool.map(lambda wish: complete(app, wish, temperature=0), wishes))
    assert len({text for text, _ in answers}) == 1
    assert [counts["drafted"] > 0 for _, counts in answers] == [False, True, True, False] * 2


def test_a_chat_and_its_stream_take_it(app: ServedApp) -> None:
    def drafted(speculation: Any) -> int:
        chunks = app.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"speculation": speculation, "ignore_eos": True},
        )
        counts: dict[str, Any] = counted("", list(chunks)[-1].usage)[1]
        number: int = counts["drafted"]
        return number

    assert drafted("off") == 0
    assert drafted(STREAMING) > 0


@pytest.mark.parametrize(
    ("speculation", "field", "message"),
    [
        ("on", "", 'must be "off" or an object'),
        ({"drafter": "medusa"}, ".drafter", "must be one of auto, streaming, snapkv,"),
        ({"drafter": "draft_model"}, ".drafter", "this server has no draft model"),
        ({"draft_length": 9}, ".draft_length", "between 0 and 8, got 9"),
        ({"draft_length": -1}, ".draft_length", "between 0 and 8, got -1"),
        ({"draft_budget": 129}, ".draft_budget", "at most 128, got 129"),
        ({"draft_budget": 8}, ".draft_budget", "at least 9 (sink, recent positions and draft"),
        ({"draft_budget": "0.5"}, ".draft_budget", 'got "0.5"'),
    ],
)
def test_a_bad_override_names_its_field_and_the_limit(
    app: ServedApp, speculation: Any, field: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(app, speculation)
    assert caught.value.param == f"speculation{field}"
    assert message in caught.value.message
