"""The KV pool of a device whose memory is made up: what it gets, and what is refused."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from magicdec.attention import AttentionContext
from magicdec.config import (
    CPU_KV_CACHE_BYTES,
    MEMORY_SHARE,
    CacheConfig,
    ConfigError,
    DraftModelConfig,
    EngineConfig,
    ModelConfig,
)
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import LoadedModel, load_model, load_tokenizer, read_model_facts
from magicdec.profiling.memory_profile import (
    GIB,
    GRAPHS_BYTES,
    CudaMemory,
    device_memory,
    largest_step,
    profile_memory,
)
from magicdec.runner import ModelRunner
from magicdec.types import SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.device_memory import FakeMemory
from tests.generation import random_prompts, requests_of, run, token_ids

CPU = torch.device("cpu")
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head_dim, fp32
BLOCK_BYTES = 8 * TOKEN_BYTES


def unset(config: EngineConfig, **cache: Any) -> EngineConfig:
    """A pool that nobody has set, or set as `cache` says."""
    return replace(config, cache=CacheConfig(block_size=8, **cache))


def runner_on(memory: FakeMemory, config: EngineConfig) -> ModelRunner:
    return ModelRunner(load_model(config.model, CPU), config, memory)


def test_a_profile_tells_weights_step_and_others_apart() -> None:
    memory = FakeMemory(80 * GIB, weights=15 * GIB, step=3 * GIB, workspace=GIB, outside=GIB)
    profile = profile_memory(memory, lambda: GIB // 2)
    assert (profile.total, profile.weights) == (80 * GIB, 15 * GIB)
    assert profile.step == 3 * GIB - GIB - GIB // 2  # neither what stays nor the cache
    assert profile.others == GIB + GIB
    assert profile.left() == (80 - 15 - 2 - 1) * GIB - 3 * GIB // 2
    assert profile.left(0.5) == profile.left() - 40 * GIB
    assert str(profile) == (
        "of 80.00 GiB of device memory weights take 15.00 GiB, the largest step 1.50 GiB, graphs "
        "1.00 GiB, others 2.00 GiB; 60.50 GiB are free"
    )


def test_a_step_that_does_not_fit_is_refused_with_what_would_help() -> None:
    def step() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said = r"the largest step does not fit: of 16\.00 GiB .* weights take 15\.00 GiB, and 0\.50 GiB"
    with pytest.raises(ConfigError, match=f"{said} are free; lower max_batch_tokens or"):
        profile_memory(FakeMemory(16 * GIB, weights=15 * GIB, outside=GIB // 2), step)


@pytest.mark.parametrize("verification", ["shared_gumbel", "optimal_coupling"])
def test_the_pool_is_what_the_share_leaves_beside_the_largest_step(
    verification: str,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran: list[tuple[int, int]] = []
    forward = LoadedModel.forward

    def recording(
        model: LoadedModel,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionContext,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert keep is not None
        assert int(positions.max()) == 511  # the longest context's last
        ran.append((len(token_ids), len(keep)))
        return forward(model, token_ids, positions, attention, keep)

    monkeypatch.setattr(LoadedModel, "forward", recording)
    config = unset(engine_config(tiny_model_dir, verification=verification, max_num_seqs=3))
    memory = FakeMemory(2 * GIB, step=4000 + BLOCK_BYTES, outside=300)
    with caplog.at_level(logging.INFO):
        num_blocks = runner_on(memory, config).num_affordable_blocks()
    pool = int(MEMORY_SHARE * 2 * GIB) - 1000 - 4000 - 300 - GRAPHS_BYTES
    assert num_blocks == pool // BLOCK_BYTES
    assert ran == [(64, 3 * 17)]  # max_batch_tokens rows, those of three longest drafts sampled
    assert memory.num_trims == 2
    said = f"KV pool of 0.80 GiB, {8 * num_blocks:,} tokens; before it, of 2.00 GiB of device"
    assert said in caplog.text


class FakeExecutor(LocalExecutor):
    """As LocalExecutor, on a device with that memory."""

    def __init__(self, config: EngineConfig, memory: FakeMemory) -> None:
        self._runner = runner_on(memory, config)
        self._runner.allocate_cache(self._runner.num_affordable_blocks())


def test_an_engine_over_a_profiled_pool_says_what_it_says_over_a_set_one(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, draft_length=3)
    requests = requests_of(random_prompts([30, 9]), SamplingParams(seed=3, max_tokens=20))
    expected = run(make_engine(config), requests)
    path = config.model.path
    total = int((GRAPHS_BYTES + 40 * BLOCK_BYTES + 1000) / MEMORY_SHARE) + 1
    executor = FakeExecutor(unset(config), FakeMemory(total, step=BLOCK_BYTES))
    assert executor.num_blocks == 40
    engine = Engine(unset(config), executor, load_tokenizer(path), read_model_facts(path))
    found = run(engine, requests)
    engine.check_integrity()
    for key, outputs in expected.items():
        assert token_ids(found[key]) == token_ids(outputs)


@pytest.mark.parametrize(
    ("cache", "field"),
    [
        ({"kv_cache_bytes": 1 << 30}, r"kv_cache_bytes 1,073,741,824"),
        ({"num_blocks": (1 << 30) // BLOCK_BYTES}, r"num_blocks 174,762"),
    ],
)
def test_a_pool_that_is_set_is_taken_where_it_fits_and_refused_where_not(
    cache: dict[str, Any], field: str, tiny_model_dir: Path
) -> None:
    config = unset(engine_config(tiny_model_dir), memory_share=0.1, **cache)
    runner = runner_on(FakeMemory(2 * GIB + (1 << 20), step=BLOCK_BYTES), config)
    assert runner.num_affordable_blocks() == (1 << 30) // BLOCK_BYTES  # whatever the share
    said = rf"{field}: the KV pool takes 1\.00 GiB, which do not fit: of 1\.50 GiB .* 0\.50 GiB are"
    with pytest.raises(ConfigError, match=said):
        runner_on(FakeMemory(3 * GIB // 2, step=BLOCK_BYTES), config).num_affordable_blocks()


@pytest.mark.parametrize(
    ("spare", "said"),
    [
        (-1, r"memory_share 0\.9 leaves nothing for the KV pool: of "),
        (BLOCK_BYTES - 1, rf"kv_cache_bytes \(one block\) must be at least {BLOCK_BYTES}, .*: of "),
    ],
)
def test_a_device_without_room_for_a_block_is_refused(
    spare: int, said: str, tiny_model_dir: Path
) -> None:
    total = int((GRAPHS_BYTES + 1000 + spare) / MEMORY_SHARE)
    runner = runner_on(FakeMemory(total, step=BLOCK_BYTES), unset(engine_config(tiny_model_dir)))
    with pytest.raises(ConfigError, match=said + r".*; lower max_batch_tokens or max_num_seqs"):
        runner.num_affordable_blocks()


@pytest.mark.parametrize("window", [None, 64])
def test_a_draft_models_cache_comes_out_of_the_pool(
    window: int | None, tiny_model_dir: Path
) -> None:
    config = engine_config(
        tiny_model_dir, draft_model=DraftModelConfig(str(tiny_model_dir), window)
    )
    ring_bytes = 8 * (4 + 64 + 17) * TOKEN_BYTES  # sequences, sink, window and slack
    total = int((GRAPHS_BYTES + 1000 + (1 << 20)) / MEMORY_SHARE) + 1
    found = runner_on(FakeMemory(total, step=BLOCK_BYTES), unset(config)).num_affordable_blocks()
    pool = int(MEMORY_SHARE * total) - GRAPHS_BYTES - 1000
    expected = pool // (2 * BLOCK_BYTES) if window is None else (pool - ring_bytes) // BLOCK_BYTES
    assert found == expected
    fits = FakeMemory(GRAPHS_BYTES + 1000 + (2 << 20), step=BLOCK_BYTES)
    blocks = (2 << 20) // BLOCK_BYTES  # with the draft model's beside them too many
    with pytest.raises(ConfigError, match=f"num_blocks {blocks}: the KV pool takes"):
        runner_on(fits, unset(config, num_blocks=blocks)).num_affordable_blocks()


@pytest.mark.parametrize(
    ("max_num_seqs", "max_batch_tokens", "max_draft_length", "max_model_len"),
    [(8, 64, 16, 512), (8, 512, 4, 512), (1, 4096, 0, 100), (64, 96, 16, 8), (2, 34, 16, 2)],
)
def test_the_largest_step_has_every_row_that_a_step_may_have(
    max_num_seqs: int,
    max_batch_tokens: int,
    max_draft_length: int,
    max_model_len: int,
    tiny_model_dir: Path,
) -> None:
    config = engine_config(
        tiny_model_dir,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_draft_length=max_draft_length,
    )
    batch, drafts = largest_step(config, max_model_len)
    rows = [len(s.token_ids) + len(d) for s, d in zip(batch.sequences, drafts, strict=True)]
    assert sum(rows) == max_batch_tokens
    sampled = [n for n, s in zip(rows, batch.sequences, strict=True) if s.sampling is not None]
    longest = min(1 + max_draft_length, max_model_len - 1)
    assert sum(sampled) == min(max_batch_tokens, max_num_seqs * longest)
    assert len(sampled) <= max_num_seqs
    for num_rows, sequence in zip(rows, batch.sequences, strict=True):
        assert sequence.num_computed_tokens + num_rows == max_model_len
        assert 8 * len(sequence.block_table) >= max_model_len
        assert not sequence.block_table.any()
        assert sequence.is_decode_row == (sequence.sampling is not None)


def test_a_cpu_has_the_pool_that_it_had(tiny_model_dir: Path) -> None:
    assert device_memory(CPU) is None
    config = EngineConfig(ModelConfig(str(tiny_model_dir), "float32"))
    assert config.cache.kv_cache_bytes is None
    expected = CPU_KV_CACHE_BYTES // (64 * TOKEN_BYTES)
    assert ModelRunner(load_model(config.model, CPU), config).num_affordable_blocks() == expected


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_share_out_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(
        ConfigError, match=f"memory_share must be above 0 and at most 1, got {share}"
    ):
        CacheConfig(memory_share=share)


@pytest.mark.gpu
def test_a_gpus_memory_is_read() -> None:
    device = torch.device("cuda")
    memory = CudaMemory(device)
    memory.trim()
    held = memory.held()
    tensor = torch.empty(GIB, dtype=torch.uint8, device=device)
    assert memory.held() >= held + GIB
    assert memory.free() <= memory.total() - GIB
    del tensor
    memory.trim()
    assert memory.held() < held + GIB
    assert memory.most_held() < held + GIB
