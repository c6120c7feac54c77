"""Prompts' chunks by flash-attn, the optional extra; rows that are few stay with Triton.

    sequence        rows                     attended by
    a chunk         more than MAX_ROWS       flash-attn: causal, aligned with the last key, unsplit
    plain, verify   MAX_ROWS at most         triton_attention

flash-attn splits the keys of few rows by how many sequences and blocks a call has, so that a row's
result would depend on its neighbours; unsplit, one long sequence would leave most of a GPU idle.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.triton_attention import MAX_ROWS, attend_on_device

logger = logging.getLogger(__name__)

# The module of each version, what it calls block tables, and what their blocks must be a multiple
# of. The later version first.
_VERSIONS = (
    ("flash-attn-3", "flash_attn_interface", "page_table", 1),
    ("flash-attn-2", "flash_attn", "block_table", 256),
)
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_DIMS = 256  # of a head


class ChunkAttention:
    """A PagedAttentionKernel of one version of flash-attn."""

    def __init__(
        self, name: str, attend: Callable[..., Any], table_name: str, block_multiple: int
    ) -> None:
        self.name = name
        self._attend = attend
        self._table_name = table_name
        self._block_multiple = block_multiple

    def paged(
        self,
        query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        v_cache: torch.Tensor,
        layout: PagedLayout,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See reference.paged_attention."""
        on_device = layout.on_device(query.device, MAX_ROWS)
        limits = (scaling, sliding_window, softcap)
        if not self._knows(query, k_cache, layout.block_size):
            return attend_on_device(query, k_cache, v_cache, on_device, *limits)
        others = replace(on_device, long=on_device.long[:0])
        output = attend_on_device(query, k_cache, v_cache, others, *limits)
        pages = [_pages(cache, layout.block_size) for cache in (k_cache, v_cache)]
        row = 0
        for i, query_len in enumerate(layout.query_lens):
            rows = slice(row, row + query_len)
            row += query_len
            if query_len <= MAX_ROWS:
                continue
            one = slice(i, i + 1)
            chunk = self._attend(
                query[:, rows].transpose(0, 1)[None],
                *pages,
                cache_seqlens=on_device.context_lens[one] + query_len,
                softmax_scale=scaling,
                causal=True,
                window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
                softcap=softcap or 0.0,
                num_splits=1,
                **{self._table_name: on_device.block_tables[one].contiguous()},
            )
            output[:, rows] = chunk[0].transpose(0, 1)
        return output

    def _knows(self, query: torch.Tensor, k_cache: torch.Tensor, block_size: int) -> bool:
        """A draft model's pages may be of another size than the target's."""
        is_shape = k_cache.shape[0] > 0 and query.shape[2] <= _MOST_DIMS
        is_dtype = query.dtype == k_cache.dtype and query.dtype in _DTYPES
        return is_shape and is_dtype and block_size % self._block_multiple == 0


def installed_versions(block_size: int) -> list[ChunkAttention]:
    """Those that take blocks of that size; a version that cannot be imported is told in the log."""
    found = []
    for name, module, table_name, multiple in _VERSIONS:
        if find_spec(module) is None:
            continue
        if block_size % multiple:
            logger.info("%s needs a block_size that is a multiple of %d", name, multiple)
            continue
        try:
            attend = import_module(module).flash_attn_with_kvcache
        except (ImportError, OSError, AttributeError) as error:
            logger.warning("%s cannot be used here: %s", name, error)
            continue
        found.append(ChunkAttention(name, attend, table_name, multiple))
    return found


def _pages(cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """As flash-attn has them, [num_blocks, block_size, num_kv_heads, head_dim], without a copy."""
    num_kv_heads, num_slots, head_dim = cache.shape
    blocks = cache.view(num_kv_heads, num_slots // block_size, block_size, head_dim)
    return blocks.permute(1, 2, 0, 3)
