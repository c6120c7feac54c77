"""The engine's tokens are those of transformers' generate, for every model family."""

from collections.abc import Callable
from pathlib import Path

import pytest

from magicdec.types import SamplingParams
from tests.conftest import FAMILIES, EngineFactory, engine_config
from tests.generation import generate_reference, random_prompts, requests_of, run, token_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate_on_a_ragged_batch(
    family: str,
    draft_length: int,
    model_dirs: Callable[[str], Path],
    make_engine: EngineFactory,
) -> None:
    path = model_dirs(family)
    prompts = random_prompts([1, 3, 8, 41, 100])
    expected = [generate_reference(path, p, GREEDY.max_tokens) for p in prompts]
    engine = make_engine(engine_config(path, draft_length=draft_length, draft_budget=20))
    outputs = run(engine, requests_of(prompts, GREEDY))
    for i, tokens in enumerate(expected):
        assert token_ids(outputs[str(i)]) == tokens
    if draft_length:
        assert engine.stats.num_draft_tokens > 0
