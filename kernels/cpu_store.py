"""Writing K/V rows into pages, by the C++ kernel of kernels/cpu."""

import ctypes
from collections.abc import Callable

import torch

from magicdec.kernels import kv_store

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_LANES = 16  # of the widest vectors: a head's dims must be a multiple


class StoreCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "key_pages", "value_pages", "slots")),
        *((name, _INT) for name in ("num_kv_heads", "num_rows", "head_dim")),
        *((name, _INT) for name in ("key_head_stride", "key_row_stride")),
        *((name, _INT) for name in ("value_head_stride", "value_row_stride", "page_head_stride")),
    )


class CpuStore:
    """Of one compiled library; what the kernel does not know takes torch's way."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[torch.dtype, torch.dtype], Callable[[object], None]] = {
            (torch.float32, torch.float32): library.store_float32,
            (torch.bfloat16, torch.bfloat16): library.store_bfloat16,
            (torch.float32, torch.bfloat16): library.store_mixed,
        }

    def __call__(
        self,
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        v_cache: torch.Tensor,
        key: torch.Tensor,  # [num_kv_heads, num_rows, head_dim]
        value: torch.Tensor,
        slot_mapping: torch.Tensor,  # int64 [num_rows]
    ) -> None:
        """See kv_store.store_kv. Both caches have the same strides."""
        num_kv_heads, num_rows, head_dim = key.shape
        function = self._functions.get((key.dtype, k_cache.dtype))
        if function is None or head_dim % _LANES or key.stride(2) != 1 or value.stride(2) != 1:
            return kv_store.store_kv(k_cache, v_cache, key, value, slot_mapping)
        call = StoreCall(
            key.data_ptr(),
            value.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            num_kv_heads,
            num_rows,
            head_dim,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            k_cache.stride(0),
        )
        function(ctypes.byref(call))
