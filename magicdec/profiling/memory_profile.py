"""What a device's memory has left for the KV pool, found by running the largest step.

|<------------------------------ memory_share ----------------------------->|
| weights | largest step | graphs | others: runtime, processes |   KV pool   |  left alone |
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from magicdec.batch import Batch, ScheduledSequence
from magicdec.config import CacheConfig, ConfigError, EngineConfig
from magicdec.sampler import Proposal
from magicdec.types import SamplingParams

logger = logging.getLogger(__name__)

GIB = 1 << 30
GRAPHS_BYTES = GIB  # captured later, when a step first needs one. An assumption
_HELP = (
    "lower max_batch_tokens or max_num_seqs, raise memory_share or tensor_parallel_size, or take a "
    "smaller model"
)


class DeviceMemory(Protocol):
    """One accelerator's memory, in bytes."""

    def total(self) -> int: ...

    def free(self) -> int:
        """Held by nobody: neither this process nor another."""
        ...

    def held(self) -> int:
        """By this process for its tensors."""
        ...

    def most_held(self) -> int:
        """The largest `held` since the last trim."""
        ...

    def trim(self) -> None:
        """Gives back what no tensor needs any more."""
        ...


class CudaMemory:
    """See DeviceMemory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def held(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def most_held(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device))

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None for a CPU, which shares the host's."""
    return CudaMemory(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """One device's memory, in bytes, before there is a pool."""

    total: int
    weights: int  # a draft model's too
    step: int  # the largest one's activations, at their peak
    others: int  # the runtime's own, and other processes'
    graphs: int = GRAPHS_BYTES

    def left(self, memory_share: float = 1.0) -> int:
        """May be below 0."""
        used = self.weights + self.step + self.others + self.graphs
        return int(memory_share * self.total) - used

    def __str__(self) -> str:
        return (
            f"of {_gib(self.total)} of device memory weights take {_gib(self.weights)}, the "
            f"largest step {_gib(self.step)}, graphs {_gib(self.graphs)}, others "
            f"{_gib(self.others)}; {_gib(max(self.left(), 0))} are free"
        )


def profile_memory(memory: DeviceMemory, run_largest_step: Callable[[], int]) -> MemoryProfile:
    """Ranks of a sharded model call it together. `run_largest_step` returns the bytes of a cache
    that it ran over and let go, which are not the step's.

    Raises ConfigError where the step does not fit beside the weights.
    """
    memory.trim()
    weights = memory.held()
    try:
        cache_bytes = run_largest_step()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the largest step does not fit: of {_gib(memory.total())} of device memory weights "
            f"take {_gib(weights)}, and {_gib(memory.free())} are free; {_HELP}"
        ) from error
    peak = memory.most_held()
    memory.trim()
    return MemoryProfile(
        total=memory.total(),
        weights=weights,
        step=max(peak - memory.held() - cache_bytes, 0),
        # What a first step leaves behind, workspaces and loaded kernels, is the runtime's.
        others=memory.total() - memory.free() - weights,
    )


def size_pool(
    profile: MemoryProfile,
    config: EngineConfig,
    blocks_in: Callable[[EngineConfig], int],  # whole blocks of the pool that is set there
    bytes_of: Callable[[int], int],  # what so many blocks take, a draft model's K/V included
) -> int:
    """Blocks of the pool that is set, or of what memory_share leaves.

    Raises ConfigError, saying what takes the memory, where a set pool does not fit into what is
    free, and where not even one block does.
    """
    cache = config.cache
    is_set = cache.kv_cache_bytes is not None or cache.num_blocks is not None
    if not is_set:
        cache = _with_pool(cache, profile)
    try:
        num_blocks = blocks_in(replace(config, cache=cache))
    except ConfigError as error:
        raise ConfigError(f"{error}: {profile}; {_HELP}") from error
    pool = bytes_of(num_blocks)
    if is_set and pool > profile.left():
        field, value = "kv_cache_bytes", cache.kv_cache_bytes
        if cache.num_blocks is not None:
            field, value = "num_blocks", cache.num_blocks
        raise ConfigError(
            f"{field} {value:,}: the KV pool takes {_gib(pool)}, which do not fit: {profile}; "
            f"leave it empty, or {_HELP}"
        )
    num_tokens = num_blocks * cache.block_size
    logger.info("KV pool of %s, %s tokens; before it, %s", _gib(pool), f"{num_tokens:,}", profile)
    return num_blocks


def _with_pool(cache: CacheConfig, profile: MemoryProfile) -> CacheConfig:
    pool = profile.left(cache.memory_share)
    if pool < 1:
        raise ConfigError(
            f"memory_share {cache.memory_share} leaves nothing for the KV pool: {profile}; {_HELP}"
        )
    return replace(cache, kv_cache_bytes=pool)


def largest_step(
    config: EngineConfig, max_model_len: int
) -> tuple[Batch, list[tuple[Proposal, ...]]]:
    """As many rows as a step may hold, as many of them sampled as may be, each sequence at the end
    of the longest context: what a step may need most memory for.

    Block tables name block 0 alone: its numbers do not matter, and one block is enough.
    """
    scheduler = config.scheduler
    longest = min(1 + config.speculation.max_draft_length, max_model_len - 1)
    table = np.zeros(-(-max_model_len // config.cache.block_size), dtype=np.int64)
    sequences: list[ScheduledSequence] = []
    drafts: list[tuple[Proposal, ...]] = []
    rows_left = scheduler.max_batch_tokens
    while rows_left > 0:
        decodes = len(sequences) < scheduler.max_num_seqs
        num_rows = min(rows_left, longest if decodes else max_model_len)
        rows_left -= num_rows
        drafts.append((Proposal(0),) * (num_rows - 1) if decodes else ())
        start = max_model_len - num_rows
        sequences.append(
            ScheduledSequence(
                sequence_id=len(sequences),
                token_ids=np.zeros(1 if decodes else num_rows, dtype=np.int64),
                num_computed_tokens=start,
                block_table=table,
                sampling=SamplingParams(temperature=1.0) if decodes else None,
                num_prompt_tokens=start if decodes else max_model_len,
                history=None,
                draft=None,
            )
        )
    return Batch(tuple(sequences)), drafts


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"
