"""The draft model's K/V: a ring sees what `streaming` sees, pages follow the target's blocks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig, PretrainedConfig

from magicdec.batch import DraftChoice, Plan, ScheduledSequence
from magicdec.config import CacheConfig, ConfigError, DraftModelConfig, EngineConfig
from magicdec.control.round_policy import FixedPolicy
from magicdec.drafters.draft_pages import DraftPages
from magicdec.executor import LocalExecutor
from magicdec.kernels.dispatch import REFERENCE
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import LayerSpec, PagedKVCache
from magicdec.types import RequestOutput, SamplingParams
from tests.conftest import FAMILIES, EngineFactory, engine_config, save_model
from tests.generation import random_prompts, requests_of, run, token_ids

WINDOW = 24
SAMPLINGS = [
    SamplingParams(temperature=t, seed=i, max_tokens=n, ignore_eos=True)
    for i, (t, n) in enumerate([(0.0, 90), (0.8, 70), (0.3, 40), (1.0, 20)])
]
REQUESTS = requests_of(random_prompts([130, 5, 21, 60]), SAMPLINGS)


def one_layer(sliding_window: int | None) -> PretrainedConfig:
    shape = FAMILIES["mistral"]().to_dict() | {"num_hidden_layers": 1}
    return MistralConfig(**shape | {"sliding_window": sliding_window})


def rounds(outputs: list[RequestOutput]) -> list[tuple[tuple[int, ...], int, int]]:
    return [(o.token_ids, o.usage.num_draft_tokens, o.usage.num_accepted_tokens) for o in outputs]


@pytest.mark.parametrize("draft_length", [1, 5, 16])
@pytest.mark.parametrize("sliding_window", [None, 10, 22, 60])
def test_one_layer_in_a_window_drafts_what_streaming_drafts(
    sliding_window: int | None, draft_length: int, tmp_path: Path, make_engine: EngineFactory
) -> None:
    """One layer's K/V depend on token and position alone, so equal views give equal drafts. One
    request at a time; drafting stops for some steps, and the ring is behind when it goes on."""
    path = save_model(tmp_path, one_layer(sliding_window))
    seen = []
    for drafter in ("streaming", "draft_model"):
        config = engine_config(
            path,
            drafter=drafter,
            draft_length=draft_length,
            draft_budget=WINDOW,
            num_blocks=100,
            max_num_seqs=1,
            draft_model=DraftModelConfig(str(path), WINDOW),
        )
        engine = make_engine(config)
        outputs: dict[str, list[RequestOutput]] = {}
        for request in REQUESTS:
            engine.add(request)
        for step in range(10_000):
            if not engine.has_unfinished():
                break
            late = step % 40 >= 30
            length = 0 if late else draft_length
            engine.policy = FixedPolicy(Plan(drafter, length, WINDOW))
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        seen.append({request_id: rounds(parts) for request_id, parts in outputs.items()})
        stats = engine.stats
        assert stats.num_draft_tokens >= stats.num_accepted_tokens > 0
        sees_all = sliding_window is not None and sliding_window <= WINDOW - draft_length
        assert sees_all == (stats.num_draft_tokens == stats.num_accepted_tokens)
    assert seen[0] == seen[1]


def test_rings_are_given_back(tiny_model_dir: Path, make_engine: EngineFactory) -> None:
    """Two rings serve seven requests, one of them aborted; a later answer is no worse for it."""
    config = engine_config(
        tiny_model_dir,
        drafter="draft_model",
        draft_length=3,
        max_num_seqs=2,
        draft_model=DraftModelConfig(str(tiny_model_dir), 200),
    )
    engine = make_engine(config)
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    requests = requests_of(random_prompts([30, 10, 50, 20, 9, 40, 5]), sampling)
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    engine.abort("0")
    outputs = run(engine)
    for request in requests[2:]:
        usage = outputs[request.request_id][-1].usage
        assert usage.num_draft_tokens == usage.num_accepted_tokens > 0


def test_the_draft_models_kv_are_counted(tiny_model_dir: Path) -> None:
    """The target as its own draft: its pages halve the pool, its rings come off before."""
    blocks = {
        window: LocalExecutor(with_bytes(tiny_model_dir, 1 << 20, window)).num_blocks
        for window in (0, None, 64)
    }
    token_bytes = 3 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head_dim, fp32
    ring_bytes = 8 * (4 + 64 + 17) * token_bytes  # sequences, sink, window and slack
    assert blocks[0] == (1 << 20) // (8 * token_bytes)
    assert blocks[None] == (1 << 20) // (2 * 8 * token_bytes)
    assert blocks[64] == ((1 << 20) - ring_bytes) // (8 * token_bytes)
    with pytest.raises(ConfigError, match=f"kv_cache_bytes must be above {ring_bytes}, .* got 9"):
        LocalExecutor(with_bytes(tiny_model_dir, 9, 64))


def with_bytes(path: Path, kv_cache_bytes: int, window: int | None) -> EngineConfig:
    """Window 0 stands for no draft model."""
    draft = None if window == 0 else DraftModelConfig(str(path), window)
    config = engine_config(path, draft_model=draft)
    return replace(config, cache=CacheConfig(block_size=8, kv_cache_bytes=kv_cache_bytes))


@pytest.fixture
def pages() -> DraftPages:
    cache = PagedKVCache((LayerSpec(1, 1, 4, None),), 4, 10, torch.float32, torch.device("cpu"))
    return DraftPages(cache, REFERENCE, "draft_model")


def row(
    table: list[int], num_computed: int, num_new: int, draft_length: int, drafter: str | None
) -> ScheduledSequence:
    draft = None if drafter is None else DraftChoice(drafter, draft_length, 1, True)
    return ScheduledSequence(
        sequence_id=table[-1],
        token_ids=np.zeros(num_new, dtype=np.int64),
        num_computed_tokens=num_computed,
        block_table=np.array(table),
        sampling=SamplingParams(),
        num_prompt_tokens=5,
        history=None,
        draft=draft,
    )


def verify(pages: DraftPages, *sequences: ScheduledSequence) -> list[ScheduledSequence]:
    """The target's forward over the sequences with drafts of full length."""
    layout = PagedLayout(
        tuple(len(s.token_ids) + s.draft_length for s in sequences),
        tuple(s.num_computed_tokens for s in sequences),
        tuple(s.block_table for s in sequences),
        4,
    )
    return pages.watch(sequences, layout)


def first_missing(pages: DraftPages, sequence: ScheduledSequence) -> int:
    (positions,) = pages.missing(sequence)
    return int(positions[0])


def test_draft_pages_are_kept_until_the_target_writes_there(pages: DraftPages) -> None:
    prompt = row([1, 2, 3], 0, 9, 0, "draft_model")
    assert verify(pages, prompt) == [prompt]
    pages.mark_fed([prompt])
    drafted = row([1, 2, 3], 9, 1, 2, "draft_model")
    assert first_missing(pages, drafted) == 9
    pages.mark_fed([drafted])
    assert verify(pages, drafted) == []
    assert first_missing(pages, row([1, 2, 3], 11, 1, 2, "draft_model")) == 10
    # Another drafter's rounds leave a gap.
    verify(pages, row([1, 2, 3], 10, 1, 1, "ngram"))
    assert first_missing(pages, row([1, 2, 3, 4], 12, 1, 2, "draft_model")) == 10
    # Others share the full blocks, and bring their own last one.
    assert first_missing(pages, row([1, 2, 5], 8, 1, 2, "draft_model")) == 8
    # A block that changes hands starts from nothing.
    verify(pages, row([2], 0, 4, 0, None))
    assert first_missing(pages, row([1, 2, 3], 11, 1, 2, "draft_model")) == 4


def test_an_earlier_owners_counts_are_not_believed(pages: DraftPages) -> None:
    """A block is trusted as far as the target has computed, whatever was drafted in it before."""
    owner = row([1, 2], 0, 8, 0, "draft_model")
    verify(pages, owner)
    pages.mark_fed([owner])
    assert first_missing(pages, row([1, 2], 4, 1, 2, "draft_model")) == 4


def test_the_tokens_of_a_window_are_the_plain_ones(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(
        tiny_model_dir,
        drafter="draft_model",
        draft_length=6,
        max_draft_length=7,
        num_blocks=100,
        draft_model=DraftModelConfig(str(tiny_model_dir), 13),
    )
    outputs = run(make_engine(config), REQUESTS)
    plain = run(make_engine(engine_config(tiny_model_dir, num_blocks=100)), REQUESTS)
    for name, expected in plain.items():
        assert token_ids(outputs[name]) == token_ids(expected)
