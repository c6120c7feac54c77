"""The n-gram drafter: what it finds, how fast, and that the tokens stay the plain ones."""

import time
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magicdec.drafters.ngram import MAX_NGRAM, MIN_NGRAM, lookup
from magicdec.types import SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, token_ids

SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.7, repetition_penalty=1.2, seed=4, max_tokens=30),
    SamplingParams(temperature=0.0, max_tokens=1),
]


def naive_lookup(history: list[int], draft_length: int) -> list[int]:
    """Longest suffix first, latest occurrence first; the draft is read token by token."""
    for size in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        suffix = history[len(history) - size :]
        for start in range(len(history) - size - 1, -1, -1):
            if len(suffix) == size and history[start : start + size] == suffix:
                text = list(history)
                for step in range(draft_length):
                    text.append(text[start + size + step])
                return text[len(history) :]
    return []


@given(
    history=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    draft_length=st.integers(1, 16),
)
def test_lookup_finds_what_a_naive_search_finds(history: list[int], draft_length: int) -> None:
    found = lookup(np.array(history, dtype=np.int64), draft_length)
    assert found.tolist() == naive_lookup(history, draft_length)


def test_the_longest_suffix_wins_and_then_the_latest_occurrence() -> None:
    history = np.array([1, 2, 3, 4, 70, 9, 2, 3, 4, 80, 3, 4, 90, 1, 2, 3, 4])
    assert lookup(history, 1).tolist() == [70]
    assert lookup(history[1:], 3).tolist() == [80, 3, 4]


def test_a_text_with_a_period_is_continued_past_its_end() -> None:
    history = np.array([5, 1, 2, 3, 1, 2, 3, 1, 2])
    assert lookup(history, 8).tolist() == [3, 1, 2, 3, 1, 2, 3, 1]


def test_a_long_history_costs_little() -> None:
    """Thirty passes over 128K tokens at most (nine measured), also where every position is a
    candidate. Counted in passes of the same machine: a busy one slows both."""
    for history in (np.zeros(1 << 17, np.int64), np.arange(1 << 17) % 50, np.arange(1 << 17)):
        lookups, passes = [], []
        for _ in range(20):
            started = time.perf_counter()
            lookup(history, 16)
            found = time.perf_counter()
            np.flatnonzero(history[:-1] == history[-1:])
            lookups.append(found - started)
            passes.append(time.perf_counter() - found)
        assert min(lookups) < 30 * min(passes)


def test_drafts_change_no_token(tiny_model_dir: Path, make_engine: EngineFactory) -> None:
    """Among others a prompt of one token and an answer of one."""
    prompts = [*random_prompts([40, 1, 70], vocab_size=12), [7, 8, 9] * 12]
    requests = requests_of(prompts, SAMPLINGS)
    plain = run(make_engine(engine_config(tiny_model_dir)), requests)
    engine = make_engine(engine_config(tiny_model_dir, draft_length=5, drafter="ngram"))
    outputs = run(engine, requests)
    assert engine.stats.num_draft_tokens > 0
    for name, expected in plain.items():
        assert token_ids(outputs[name]) == token_ids(expected)


def test_an_answer_that_repeats_itself_is_accepted(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """A negative frequency penalty makes a random model repeat itself: found in its output, the
    prompt holds no such text."""
    sampling = SamplingParams(
        temperature=0.0, frequency_penalty=-2.0, max_tokens=100, ignore_eos=True
    )
    requests = requests_of(random_prompts([30, 31, 32, 33]), sampling)
    plain = run(make_engine(engine_config(tiny_model_dir, num_blocks=128)), requests)
    engine = make_engine(
        engine_config(tiny_model_dir, draft_length=4, drafter="ngram", num_blocks=128)
    )
    outputs = run(engine, requests)
    for name, expected in plain.items():
        assert token_ids(outputs[name]) == token_ids(expected)
    assert engine.stats.num_accepted_tokens > 0.8 * engine.stats.num_draft_tokens > 0


def test_a_repetitive_prompt_is_accepted_whole(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=40, logit_bias=((7, 100.0),))
    engine = make_engine(engine_config(tiny_model_dir, draft_length=4, drafter="ngram"))
    (request,) = requests_of([[7] * 9], sampling)
    usage = run(engine, [request])["0"][-1].usage
    assert usage.num_accepted_tokens == usage.num_draft_tokens > 0
    assert usage.num_rounds == 8  # 39 tokens in rounds of 5, after the prefill's own
