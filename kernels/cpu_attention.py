"""Paged attention by the C++ kernel of kernels/cpu: a row's result is the same in any batch."""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels import paged_attention, reference
from magicdec.kernels.cpu_store import CpuStore
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.sparse_attention import CopiedView, DraftView

_LANES = 16  # of the widest vectors: a head's dims must be a multiple
_MAX_ROWS = 32  # of a sequence: for longer chunks of a prompt torch's kernel is the faster one,
_ANY_ROWS = 1 << 62  # but not where bf16 is multiplied in pairs
_PAIR_DIMS = 32  # of a head whose bf16 products are of pairs: a multiple of these, pair_tiles.h
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_Arrays = tuple[NDArray[np.int64], ...]
_Functions = dict[tuple[torch.dtype, torch.dtype], Callable[[object], None]]  # of rows and pages


class AttentionCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "output", "keys", "values", "mask")),
        *((name, _POINTER) for name in ("row_starts", "query_lens", "context_lens")),
        *((name, _POINTER) for name in ("tables", "table_starts")),
        *((name, _POINTER) for name in ("slots", "own_keys", "own_values")),
        *((name, _INT) for name in ("num_sequences", "block_size", "num_listed", "num_own")),
        *((name, _INT) for name in ("query_head_stride", "query_row_stride")),
        *((name, _INT) for name in ("output_head_stride", "output_row_stride", "kv_head_stride")),
        *((name, _INT) for name in ("num_query_heads", "num_kv_heads", "head_dim", "window")),
        ("scaling", _FLOAT),
        ("softcap", _FLOAT),
        ("num_threads", ctypes.c_int32),
    )


class CpuAttention:
    """The two attentions of a round over one compiled library.

    Rows may be wider than the pages (fp32 over bfloat16). What the kernel does not know (float16,
    odd head sizes) takes torch's way, and so do long chunks of prompts where that is faster.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: _Functions = {
            (torch.float32, torch.float32): library.attend_float32,
            (torch.bfloat16, torch.bfloat16): library.attend_bfloat16,
            (torch.float32, torch.bfloat16): library.attend_mixed,
        }
        self._store = CpuStore(library)
        self._multiplies_pairs = bool(library.multiplies_pairs())

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
        most_rows = self._most_rows(query) if softcap is None else _ANY_ROWS
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
                query, k_cache, v_cache, layout, scaling, sliding_window, most_rows, output
            )
        return output

    def view(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        num_own: int,
    ) -> DraftView:
        """See sparse_attention.MakeView."""
        if not _is_known(k_cache):
            return CopiedView(reference.gathered_attention, k_cache, v_cache, slots, num_own)
        return _ListedView(self._functions, self._store, k_cache, v_cache, slots, num_own)

    def _most_rows(self, query: torch.Tensor) -> int:
        """Of a sequence, with which it comes here."""
        narrow = query.dtype is torch.bfloat16 and query.shape[2] % _PAIR_DIMS == 0
        return _ANY_ROWS if narrow and self._multiplies_pairs else _MAX_ROWS

    def _function(self, query: torch.Tensor, keys: torch.Tensor) -> Callable[[object], None] | None:
        """None: the kernel does not know such tensors."""
        if not _is_known(keys) or query.stride(2) != 1:
            return None
        return self._functions.get((query.dtype, keys.dtype))


class _ListedView:
    """Nothing is copied: a draft step reads the listed slots where they are."""

    def __init__(
        self,
        functions: _Functions,
        store: CpuStore,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        num_own: int,
    ) -> None:
        num_kv_heads, batch, num_listed = slots.shape
        self._functions, self._store = functions, store
        self._k_cache, self._v_cache = k_cache, v_cache
        self._slots = slots.contiguous()
        # Zeros, since a column that the mask hides is read all the same.
        shape = (2, num_kv_heads, batch * num_own, k_cache.shape[2])
        self._own_keys, self._own_values = k_cache.new_zeros(shape)
        self._own_slots = _own_slots(batch, num_own)
        self._indices, self._ones, self._num_keys = _one_row_each(batch, num_listed + num_own)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: int,
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See DraftView."""
        self._store(self._own_keys, self._own_values, key, value, self._own_slots[step])
        query = query if query.stride(2) == 1 else query.contiguous()
        output = _like_rows(query)
        call = _call(query, self._k_cache, self._v_cache, output, scaling, softcap)
        call.row_starts, call.query_lens = self._indices.ctypes.data, self._ones.ctypes.data
        call.context_lens, call.num_sequences = self._num_keys.ctypes.data, len(self._ones)
        call.slots, call.num_listed = self._slots.data_ptr(), self._slots.shape[2]
        call.own_keys, call.own_values = self._own_keys.data_ptr(), self._own_values.data_ptr()
        call.num_own, call.mask = len(self._own_slots), mask.data_ptr()
        self._functions[query.dtype, self._k_cache.dtype](ctypes.byref(call))
        return output


@lru_cache(maxsize=64)
def _own_slots(batch: int, num_own: int) -> torch.Tensor:
    """Where the sequences' rows of each step go, [num_own, batch]."""
    return (torch.arange(batch) * num_own + torch.arange(num_own)[:, None]).contiguous()


@lru_cache(maxsize=64)
def _one_row_each(batch: int, num_keys: int) -> _Arrays:
    """Row starts, rows and keys of sequences that have one row and a view each."""
    return (
        np.arange(batch, dtype=np.int64),
        np.ones(batch, dtype=np.int64),
        np.full(batch, num_keys, dtype=np.int64),
    )


def _is_known(cache: torch.Tensor) -> bool:
    num_kv_heads, _, head_dim = cache.shape
    narrow_enough = cache.dtype in (torch.float32, torch.bfloat16)
    return num_kv_heads > 0 and head_dim % _LANES == 0 and narrow_enough


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
