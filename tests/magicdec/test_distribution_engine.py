"""Optimal coupling in a whole engine: the law of plain decoding, and its greedy tokens."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from magicdec.types import SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.distributions import FALSE_ALARM, homogeneity, seeded
from tests.generation import random_prompts, requests_of, run, token_ids

PROMPT = random_prompts([40], seed=3)[0]
# Few tokens with a chance each, so that a few hundred seeds fill the cells.
SAMPLED = SamplingParams(temperature=1.0, top_k=4, max_tokens=4, ignore_eos=True)
NUM_TOKENS = 4
DRAFT_BUDGET = 38  # most of the prompt: of a random model, less is hardly ever accepted


def answers(
    make_engine: EngineFactory, path: Path, samplings: list[SamplingParams], draft_length: int
) -> tuple[NDArray[np.int64], float]:
    """[num_requests, NUM_TOKENS] and the share of drafted tokens that were accepted."""
    config = engine_config(
        path,
        draft_length=draft_length,
        draft_budget=DRAFT_BUDGET,
        num_blocks=100,
        verification="optimal_coupling",
    )
    engine = make_engine(config)
    outputs = run(engine, requests_of([PROMPT] * len(samplings), samplings))
    tokens = np.array([token_ids(outputs[str(i)]) for i in range(len(samplings))])
    return tokens, engine.stats.num_accepted_tokens / max(engine.stats.num_draft_tokens, 1)


def counts(tokens: NDArray[np.int64], cells: dict[tuple[int, ...], int]) -> NDArray[np.float64]:
    found = np.zeros(len(cells))
    for row in tokens.tolist():
        found[cells[tuple(row)]] += 1
    return found


def pair_p_value(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Of two samples of token pairs, [num_draws, 2], having one law."""
    drawn = sorted({tuple(row) for row in [*a.tolist(), *b.tolist()]})
    cells = {pair: i for i, pair in enumerate(drawn)}
    return homogeneity(counts(a, cells), counts(b, cells))


def compare(make_engine: EngineFactory, path: Path, num_seeds: int) -> None:
    plain, _ = answers(make_engine, path, seeded(num_seeds, SAMPLED), draft_length=0)
    drafted, share = answers(make_engine, path, seeded(num_seeds, SAMPLED, first=10**6), 3)
    assert 0.05 < share < 0.95  # both ends of the rule were at work
    for i in range(NUM_TOKENS - 1):
        assert pair_p_value(plain[:, i : i + 2], drafted[:, i : i + 2]) > FALSE_ALARM
    # The statistic tells a position's law from its neighbour's.
    assert pair_p_value(plain[:, :2], drafted[:, 1:3]) < FALSE_ALARM


def test_drafted_tokens_have_the_law_of_plain_ones(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """300 seeds each, pairs of neighbouring tokens. False alarms: 3e-4, three p-values."""
    compare(make_engine, tiny_model_dir, 300)


@pytest.mark.slow
def test_drafted_tokens_have_the_law_of_plain_ones_over_many_seeds(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """5,000 seeds each. False alarms: 3e-4, three p-values."""
    compare(make_engine, tiny_model_dir, 5_000)


def test_a_seed_repeats_its_tokens_under_the_same_settings(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """And other draft lengths give other tokens, which is the price."""
    samplings = seeded(24, SAMPLED)
    first, _ = answers(make_engine, tiny_model_dir, samplings, draft_length=3)
    again, _ = answers(make_engine, tiny_model_dir, samplings, draft_length=3)
    plain, _ = answers(make_engine, tiny_model_dir, samplings, draft_length=0)
    np.testing.assert_array_equal(first, again)
    assert (first != plain).any()


@pytest.mark.parametrize("draft_length", [1, 4])
def test_greedy_requests_get_the_plain_tokens(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """Beside sampled ones in the same batch."""
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=20, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=20, frequency_penalty=0.7, min_tokens=20),
    ]
    requests = requests_of(random_prompts([9, 33, 64, 100], seed=4), samplings)
    plain = run(make_engine(engine_config(tiny_model_dir, num_blocks=100)), requests)
    config = engine_config(
        tiny_model_dir,
        draft_length=draft_length,
        num_blocks=100,
        verification="optimal_coupling",
    )
    drafted = run(make_engine(config), requests)
    for i, sampling in enumerate(samplings):
        if sampling.temperature == 0.0:
            assert token_ids(drafted[str(i)]) == token_ids(plain[str(i)])
