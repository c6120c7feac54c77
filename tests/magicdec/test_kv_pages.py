"""The pages hold what a full recompute gives, and nothing rejected is ever read (T10)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from magicdec.engine import Engine
from magicdec.kv_cache import PagedKVCache
from magicdec.sequence import Sequence
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, token_ids
from tests.magicdec.test_speculation import SAMPLINGS, plain_tokens

PROMPTS = random_prompts([3, 33, 64, 90, 140])
DRAFTERS = ["streaming", "snapkv", "recycled"]
BLOCK_SIZE = 8


def pages_of(engine: Engine) -> PagedKVCache:
    pages = engine._executor._runner._pages  # type: ignore[attr-defined]
    assert isinstance(pages, PagedKVCache)
    return pages


def computed_slots(sequence: Sequence) -> torch.Tensor:
    positions = torch.arange(sequence.num_computed_tokens)
    table = torch.tensor(sequence.block_table)
    return table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_after_many_rounds_the_pages_equal_a_recompute(
    drafter: str, family: str, model_dirs: Callable[[str], Path], make_engine: EngineFactory
) -> None:
    path = model_dirs(family)
    engine = make_engine(
        engine_config(path, draft_length=4, draft_budget=20, drafter=drafter, num_blocks=120)
    )
    for request in requests_of(PROMPTS, SAMPLINGS[: len(PROMPTS)]):
        engine.add(request)
    while engine.stats.num_rounds < 7:
        engine.step()
    pages = pages_of(engine)
    device = pages.k[0].device
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device)
    for sequence in engine._scheduler.running:
        computed = sequence.token_ids[: sequence.num_computed_tokens]
        tokens = torch.tensor([computed], device=device)
        with torch.inference_mode():
            cache = model(tokens, use_cache=True).past_key_values
        slots = computed_slots(sequence)
        for layer, expected in enumerate(cache.layers):
            kept = expected.keys.shape[2]  # a sliding layer's cache keeps its window alone
            torch.testing.assert_close(
                pages.k[layer][:, slots[-kept:]], expected.keys[0], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                pages.v[layer][:, slots[-kept:]], expected.values[0], atol=1e-4, rtol=1e-4
            )
    run(engine)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_row_reads_a_slot_that_holds_no_accepted_token(
    drafter: str, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """After every step all other slots are filled with keys that would drown the real ones."""
    requests = requests_of(PROMPTS, SAMPLINGS[: len(PROMPTS)])
    config = engine_config(
        tiny_model_dir,
        draft_length=4,
        draft_budget=20,
        drafter=drafter,
        num_blocks=120,
        prefix_caching=False,
    )
    engine = make_engine(config)
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {r.request_id: [] for r in requests}
    generator = torch.Generator().manual_seed(0)
    while engine.has_unfinished():
        for output in engine.step():
            answers[output.request_id] += token_ids([output])
        pages = pages_of(engine)
        stale = torch.ones(pages.k[0].shape[1], dtype=torch.bool)
        for sequence in engine._scheduler.running:
            stale[computed_slots(sequence)] = False
        for tensor in (*pages.k, *pages.v):
            garbage = torch.randn(tensor[:, stale].shape, generator=generator) * 1e3
            tensor[:, stale] = garbage.to(tensor.device)
    assert engine.stats.num_draft_tokens > engine.stats.num_accepted_tokens
    assert [answers[r.request_id] for r in requests] == plain_tokens(tiny_model_dir, requests)
