"""Whole rounds of the engine by graphs give the tokens that it gives without: prompts join while
others decode, views are refreshed from replayed rounds, drafts are chosen on the device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magicdec.engine import Engine
from magicdec.types import Request, SamplingParams, SpeculationParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, run, token_ids
from tests.magicdec.graphs.conftest import MakeWatched

if torch.cuda.is_available():
    pytest.skip("a GPU captures graphs itself", allow_module_level=True)

SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=6, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
NUCLEUS = SamplingParams(temperature=0.8, top_p=0.8, seed=6, max_tokens=5, ignore_eos=True)


def requests(sampling: list[SamplingParams]) -> list[Request]:
    """The second prompt begins as the first one does."""
    first, *others = random_prompts([44, 12, 30])
    prompts = [first, first[:40] + others[0], others[1]]
    return [Request(str(i), tuple(prompts[i]), s) for i, s in enumerate(sampling)]


def staggered(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    """One arrives at the beginning, the others while it decodes."""
    engine.add(wanted[0])
    outputs: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    for request in [None, None, *wanted[1:]]:
        if request is not None:
            engine.add(request)
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    for name, rest in run(engine).items():
        outputs[name] += token_ids(rest)
    return outputs


@pytest.mark.parametrize(
    "sampling", [[SAMPLED, GREEDY, SAMPLED], [GREEDY, SAMPLED, NUCLEUS]], ids=["device", "host"]
)
def test_rounds_by_graphs_give_the_tokens_of_rounds_without(
    folder: Path,
    sampling: list[SamplingParams],
    make_engine: EngineFactory,
    by_graphs: MakeWatched,
) -> None:
    """`recycled` observes each prompt's end and, here, some sequence's rows in every round."""
    config = engine_config(
        folder, draft_length=2, drafter="recycled", draft_budget=24, max_batch_tokens=48
    )
    plain = make_engine(config)
    expected = staggered(plain, requests(sampling))
    watched = by_graphs(config)
    assert staggered(watched.engine, requests(sampling)) == expected
    assert [len(tokens) for tokens in expected.values()] == [s.max_tokens for s in sampling]
    stats = watched.engine.stats
    assert stats == replace(
        plain.stats, draft_seconds=stats.draft_seconds, verify_seconds=stats.verify_seconds
    )
    assert watched.mixed_steps >= 2 and watched.observed_rounds >= 2
    assert watched.capturer.replays["StaticDraftStep"] >= 3 * 2
    assert stats.num_cached_tokens > 0 and stats.num_accepted_tokens > 0


def test_ragged_drafts_beside_rows_without_give_the_tokens_of_rounds_without_graphs(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    """Drafts of one and of three tokens, a row without any, one that looks its drafts up, and
    prompts' chunks that join."""
    alike = SamplingParams(temperature=0.0, logit_bias=((5, 100.0),), max_tokens=9, ignore_eos=True)
    asked = [
        (replace(SAMPLED, max_tokens=12), SpeculationParams(draft_length=1)),
        (replace(GREEDY, max_tokens=12), SpeculationParams(draft_length=3)),
        (SAMPLED, SpeculationParams(enabled=False)),
        (alike, SpeculationParams(drafter="ngram", draft_length=4)),
    ]
    config = engine_config(folder, draft_length=2, max_batch_tokens=48, max_draft_length=4)
    prompts = [*random_prompts([44, 30, 12]), [5] * 10]
    wanted = [
        Request(str(i), tuple(prompts[i]), sampling, speculation=speculation)
        for i, (sampling, speculation) in enumerate(asked)
    ]
    expected = staggered(make_engine(config), wanted)
    watched = by_graphs(config)
    assert staggered(watched.engine, wanted) == expected
    assert watched.mixed_steps >= 1
    assert any({0, 1, 3, 4} <= set(lengths) for lengths in watched.drafted)
