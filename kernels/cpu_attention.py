"""Paged attention by the C++ kernel of kernels/cpu: a row's result is the same in any batch."""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels import paged_attention, reference
from magicdec.kernels.paged_layout import PagedLayout

_LANES = 16  # of the widest vectors: a head's dims must be a multiple
_MAX_ROWS = 32  # of a sequence: torch's kernel is made for longer chunks of a prompt
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_Arrays = tuple[NDArray[np.int64], ...]


class AttentionCall(ctypes.Structure):
    """As in paged_attention.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "output", "keys", "values", "mask")),
        *((name, _POINTER) for name in ("row_starts", "query_lens", "context_lens")),
        *((name, _POINTER) for name in ("tables", "table_starts")),
        *((name, _INT) for name in ("num_sequences", "block_size")),
        *((name, _INT) for name in ("query_head_stride", "query_row_stride")),
        *((name, _INT) for name in ("output_head_stride", "output_row_stride", "kv_head_stride")),
        *((name, _INT) for name in ("num_query_heads", "num_kv_heads", "head_dim", "window")),
        ("scaling", _FLOAT),
        ("softcap", _FLOAT),
        ("num_threads", ctypes.c_int32),
    )


class CpuAttention:
    """The two attentions of a round over one compiled library.

    Rows may be wider than the pages (fp32 over bfloat16). Long chunks of prompts and what the
    kernel does not know (float16, odd head sizes) take torch's way.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[torch.dtype, torch.dtype], Callable[[object], None]] = {
            (torch.float32, torch.float32): library.attend_float32,
            (torch.bfloat16, torch.bfloat16): library.attend_bfloat16,
            (torch.float32, torch.bfloat16): library.attend_mixed,
        }

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
        function = self._function(query, k_cache)
        if function is None:
            return paged_attention.paged_attention(
                query, k_cache, v_cache, layout, scaling, sliding_window, softcap
            )
        output = _like_rows(query)
        most_rows = _MAX_ROWS if softcap is None else max(layout.query_lens)
        row_starts, query_lens, context_lens, tables, table_starts = layout.packed(most_rows)
        if len(query_lens) > 0:
            call = _call(query, k_cache, v_cache, output, scaling, softcap)
            call.row_starts, call.query_lens = row_starts.ctypes.data, query_lens.ctypes.data
            call.context_lens, call.tables = context_lens.ctypes.data, tables.ctypes.data
            call.table_starts, call.num_sequences = table_starts.ctypes.data, len(query_lens)
            call.block_size, call.window = layout.block_size, sliding_window or 0
            function(ctypes.byref(call))
        if len(query_lens) < len(layout.query_lens):
            paged_attention.attend_chunks(
                query, k_cache, v_cache, layout, scaling, sliding_window, _MAX_ROWS, output
            )
        return output

    def gathered(
        self,
        query: torch.Tensor,  # [num_query_heads, batch, head_dim]
        k_view: torch.Tensor,  # [num_kv_heads, batch, num_keys, head_dim], contiguous
        v_view: torch.Tensor,
        mask: torch.Tensor,  # additive, k_view.dtype, [batch, num_keys]
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See reference.gathered_attention."""
        function = self._function(query, k_view)
        if function is None:
            return reference.gathered_attention(query, k_view, v_view, mask, scaling, softcap)
        output = _like_rows(query)
        _, batch, num_keys, _ = k_view.shape
        ones, num_context, indices = _one_block_each(batch, num_keys)
        call = _call(query, k_view, v_view, output, scaling, softcap)
        call.row_starts, call.query_lens = indices.ctypes.data, ones.ctypes.data
        call.context_lens, call.tables = num_context.ctypes.data, indices.ctypes.data
        call.table_starts, call.num_sequences = indices.ctypes.data, batch
        call.block_size, call.mask = num_keys, mask.data_ptr()
        function(ctypes.byref(call))
        return output

    def _function(self, query: torch.Tensor, keys: torch.Tensor) -> Callable[[object], None] | None:
        """None: the kernel does not know such tensors."""
        if keys.shape[0] == 0 or keys.shape[-1] % _LANES or query.stride(2) != 1:
            return None
        return self._functions.get((query.dtype, keys.dtype))


@lru_cache(maxsize=64)
def _one_block_each(batch: int, num_keys: int) -> _Arrays:
    """A view as pages: sequence i's keys are block i."""
    return (
        np.ones(batch, dtype=np.int64),
        np.full(batch, num_keys, dtype=np.int64),
        np.arange(batch, dtype=np.int64),
    )


def _like_rows(query: torch.Tensor) -> torch.Tensor:
    """Shaped like query, a row's heads side by side, as the output projection reads them."""
    num_heads, num_rows, head_dim = query.shape
    return query.new_empty(num_rows, num_heads, head_dim).transpose(0, 1)


def _call(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> AttentionCall:
    return AttentionCall(
        query=query.data_ptr(),
        output=output.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        query_head_stride=query.stride(0),
        query_row_stride=query.stride(1),
        output_head_stride=output.stride(0),
        output_row_stride=output.stride(1),
        kv_head_stride=keys.stride(0),
        num_query_heads=query.shape[0],
        num_kv_heads=keys.shape[0],
        head_dim=query.shape[2],
        scaling=scaling,
        softcap=softcap or 0.0,
        num_threads=torch.get_num_threads(),
    )
