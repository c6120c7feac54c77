"""The paged K/V tensors of one rank."""

import contextlib
import math
import mmap
import sys
from dataclasses import dataclass

import torch

from magicdec.config import CacheConfig, check_at_least

_NOISE_SLOTS = 4096  # after which the noise of unwritten slots repeats


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer as this rank holds it: head counts are those of its own shard."""

    num_query_heads: int
    num_kv_heads: int  # may be 0 on a rank of a model with fewer KV heads than ranks
    head_dim: int
    sliding_window: int | None


class PagedKVCache:
    """K and V of every layer, one slot a token, heads outermost.

        slot    0 ........ block_size-1 | block_size ........ 2*block_size-1 | ...
                |------- block 0 -------|------------- block 1 --------------|
        layer l  k[l]: [num_kv_heads, num_blocks * block_size, head_dim]     v[l]: the same

    A block holds the same positions in every layer, so one block table serves them all. Heads are
    outermost because a head's keys are then one stream in memory. A rank may hold no KV head.
    """

    def __init__(
        self,
        layers: tuple[LayerSpec, ...],
        block_size: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shapes = [(s.num_kv_heads, num_blocks * block_size, s.head_dim) for s in layers]
        self.k = [_pages(shape, dtype, device) for shape in shapes]
        self.v = [_pages(shape, dtype, device) for shape in shapes]


def _pages(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros on a GPU, noise on a CPU, where pages that nobody has written are all one page of the
    kernel's: a start-up profile would read that from the processor's cache, and every key would
    weigh the same."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = _huge_pages(shape, dtype)
    _, num_slots, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(min(num_slots, _NOISE_SLOTS), head_dim, generator=generator).to(dtype)
    for start in range(0, num_slots, len(noise)):
        pages[:, start : start + len(noise)] = noise[: num_slots - start]
    return pages


def _huge_pages(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Huge pages, where the kernel has them: a view's keys lie far apart, and looking up a small
    page for each takes as long as reading them."""
    if sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    # Not shared, as mmap has it by default: the kernel keeps shared memory in small pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bytes_per_token(layers: tuple[LayerSpec, ...], dtype: torch.dtype) -> int:
    """K and V of one token on this rank."""
    return 2 * dtype.itemsize * sum(s.num_kv_heads * s.head_dim for s in layers)


def num_affordable_blocks(
    layers: tuple[LayerSpec, ...], dtype: torch.dtype, cache: CacheConfig
) -> int:
    """Whole blocks within the rank's memory; a rank without KV heads affords any number.

    Raises ConfigError when not even one fits.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    block_bytes = bytes_per_token(layers, dtype) * cache.block_size
    if block_bytes == 0:
        return 2**31
    check_at_least("kv_cache_bytes (one block)", cache.pool_bytes, block_bytes)
    return cache.pool_bytes // block_bytes
