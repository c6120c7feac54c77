"""A prompt's last chunk holds the whole observation window, and nobody starves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.config import EngineConfig
from magicdec.types import Request, SamplingParams
from tests.conftest import engine_config
from tests.scheduling import NUM_IDS, Simulation, plain_answer

MAX_MODEL_LEN = 340


def config_of(prefix_caching: bool = True, **changes: Any) -> EngineConfig:
    config = engine_config(Path("unused"), **changes)
    return replace(config, cache=replace(config.cache, prefix_caching=prefix_caching))


def request_of(
    name: str, prompt: list[int], max_tokens: int, journal: int = 0, stops: bool = False
) -> Request:
    """`journal` is how many tokens of the answer another replica sent already."""
    stop_ids = (NUM_IDS - 1,) if stops else ()
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_ids)
    request = Request(name, tuple(prompt), sampling)
    sent = plain_answer(request)
    return replace(request, emitted_token_ids=tuple(sent[: min(journal, len(sent) - 1)]))


@st.composite
def request_lists(draw: st.DrawFn) -> list[Request]:
    """Prompts of 1..300 tokens; most begin like one of two texts."""
    texts = [[i * (7 + t) // 3 % NUM_IDS for i in range(300)] for t in range(2)]
    requests = []
    for i in range(draw(st.integers(1, 7))):
        length, shared = draw(st.integers(1, 300)), draw(st.integers(0, 300))
        own = [(i + j * j) % NUM_IDS for j in range(300)]
        prompt = (draw(st.sampled_from(texts))[:shared] + own)[:length]
        max_tokens = draw(st.integers(1, 40))
        journal, stops = draw(st.integers(0, 39)), draw(st.booleans())
        requests.append(request_of(str(i), prompt, max_tokens, journal, stops))
    return requests


@settings(max_examples=100, deadline=None)
@given(
    requests=request_lists(),
    arrivals=st.lists(st.integers(0, 12), min_size=7, max_size=7),
    cancelled=st.dictionaries(st.integers(0, 6), st.integers(0, 25), max_size=2),
    max_num_seqs=st.integers(1, 6),
    spare_rows=st.integers(0, 200),
    draft_length=st.integers(0, 6),
    block_size=st.sampled_from([1, 3, 8, 16, 64]),
    spare_blocks=st.integers(0, 60),
    prefix_caching=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_window_is_whole_every_answer_is_right_and_everybody_finishes(
    requests: list[Request],
    arrivals: list[int],
    cancelled: dict[int, int],
    max_num_seqs: int,
    spare_rows: int,
    draft_length: int,
    block_size: int,
    spare_blocks: int,
    prefix_caching: bool,
    seed: int,
) -> None:
    """Simulation.step checks the windows, the budget and every write."""
    num_blocks = -(-MAX_MODEL_LEN // block_size) + spare_blocks
    config = config_of(
        prefix_caching,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_seqs + 32 + spare_rows,
        draft_length=draft_length,
    )
    simulation = Simulation(config, num_blocks, MAX_MODEL_LEN, seed)
    sequences = {}
    for step in range(40):
        for i, request in enumerate(requests):
            if arrivals[i] == step:
                sequences[i] = simulation.add(request)
            if i in sequences and cancelled.get(i) == step:
                simulation.scheduler.drop(sequences[i])
        simulation.step()
    simulation.run()
    for i, request in enumerate(requests):
        answer = sequences[i].token_ids[sequences[i].num_prompt_tokens :]
        whole = plain_answer(request)
        assert answer == (whole[: len(answer)] if i in cancelled else whole)
        assert (sequences[i].num_cached_tokens or 0) <= len(request.prompt_token_ids)
    assert simulation.scheduler.pool.num_free == num_blocks


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_every_prompt_length_and_budget_keeps_the_window(prefix_caching: bool) -> None:
    """Each length alone and, with the cache, after all shorter ones of the same text."""
    text = [i * i % 7 % NUM_IDS for i in range(300)]
    for spare_rows in (0, 1, 17, 32, 33, 300):
        config = config_of(prefix_caching, max_num_seqs=1, max_batch_tokens=33 + spare_rows)
        simulation = Simulation(config, 64, 512, seed=0)
        for length in range(1, 301):
            simulation.run([request_of(str(length), text[:length], max_tokens=1)], max_steps=400)


def test_a_long_prompt_advances_beside_drafting_sequences() -> None:
    """The window needs 32 rows: drafts leave them, however many sequences decode."""
    config = config_of(max_num_seqs=6, max_batch_tokens=38, draft_length=6, num_blocks=300)
    simulation = Simulation(config, 300, 512, seed=0)
    for i in range(5):
        simulation.add(request_of(str(i), [i % NUM_IDS] * (1 + i), max_tokens=300))
    for _ in range(5):
        simulation.step()
    newcomer = simulation.add(request_of("newcomer", [1, 2] * 150, max_tokens=1))
    for _ in range(-(-300 // 32) + 1):
        simulation.step()
    assert newcomer.num_output_tokens == 1


def test_preempted_sequences_finish_with_the_plain_answer_and_whole_windows() -> None:
    config = config_of(num_blocks=40, draft_length=4)
    simulation = Simulation(config, 40, 320, seed=0)
    # Short answers under the same limit: admission then expects others to be short.
    simulation.run([request_of(f"short {i}", [i, 1], 90, stops=True) for i in range(20)])
    simulation.sequences.clear()
    requests = [request_of(str(i), [i, 1, 2] * 20, max_tokens=90) for i in range(5)]
    assert simulation.run(requests) == [plain_answer(r) for r in requests]
    assert simulation.scheduler.num_preemptions > 0
