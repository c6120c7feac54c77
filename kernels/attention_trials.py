"""What a paged attention gives and takes on made-up rows: by it a backend is chosen."""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from magicdec.kernels import reference
from magicdec.kernels.paged_layout import PagedLayout

logger = logging.getLogger(__name__)

_NUM_TIMED = 5


@dataclass(frozen=True, slots=True)
class _Case:
    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    layout: PagedLayout

    def run(self, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        scaling = self.query.shape[2] ** -0.5
        return attend(self.query, self.k_cache, self.v_cache, self.layout, scaling)


def difference_of(
    attend: Callable[..., torch.Tensor],  # as reference.paged_attention
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
) -> float:
    """The largest from the reference: 3 rows over 600 keys and a chunk of 40 after 70, 2 KV heads
    of 3 queries each. Infinite where it cannot run."""
    case = _made_up((3, 40), (597, 70), (2, 3, 64), device, dtype, block_size)
    try:
        out = case.run(attend)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("an attention cannot run here: %s", error)
        return float("inf")
    return float((out.float() - case.run(reference.paged_attention).float()).abs().max())


def chunk_seconds(
    attend: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, block_size: int
) -> float:
    """Of 512 rows after 3,584 keys, 8 KV heads of 4 queries each: a median, after one run that
    compiles. Infinite where it cannot run."""
    case = _made_up((512,), (3584,), (8, 4, 128), device, dtype, block_size)
    measured = []
    for _ in range(_NUM_TIMED + 1):
        started = time.perf_counter()
        try:
            case.run(attend)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError) as error:
            logger.warning("an attention cannot run here: %s", error)
            return float("inf")
        measured.append(time.perf_counter() - started)
    return statistics.median(measured[1:])


def _made_up(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    shape: tuple[int, int, int],  # KV heads, queries of each, dims of a head
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
) -> _Case:
    num_kv_heads, group_size, head_dim = shape
    longest = max(c + q for c, q in zip(context_lens, query_lens, strict=True))
    blocks = np.arange(len(query_lens) * -(-longest // block_size))
    tables = tuple(np.split(blocks, len(query_lens)))
    generator = torch.Generator().manual_seed(0)
    rows = (num_kv_heads * group_size, sum(query_lens), head_dim)
    query = torch.randn(rows, generator=generator).to(device, dtype)
    pages = (2, num_kv_heads, len(blocks) * block_size, head_dim)
    k_cache, v_cache = torch.randn(pages, generator=generator).to(device, dtype)
    return _Case(query, k_cache, v_cache, PagedLayout(query_lens, context_lens, tables, block_size))
