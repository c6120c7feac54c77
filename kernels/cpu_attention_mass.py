"""What views are chosen by, from the C++ kernel of kernels/cpu."""

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from magicdec.kernels import selection
from magicdec.kernels.paged_layout import PagedLayout

_LANES = 16  # of the widest vectors: a head's dims must be a multiple
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class MassCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "keys", "mass", "table")),
        *((name, _INT) for name in ("num_rows", "num_keys", "block_size")),
        *((name, _INT) for name in ("query_head_stride", "query_row_stride", "kv_head_stride")),
        *((name, _INT) for name in ("num_query_heads", "num_kv_heads", "head_dim")),
        ("scaling", _FLOAT),
        ("softcap", _FLOAT),
        ("num_threads", ctypes.c_int32),
    )


class CpuAttentionMass:
    """selection.attention_mass over one compiled library; what it does not know goes there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[torch.dtype, torch.dtype], Callable[[object], None]] = {
            (torch.float32, torch.float32): library.attention_mass_float32,
            (torch.bfloat16, torch.bfloat16): library.attention_mass_bfloat16,
            (torch.float32, torch.bfloat16): library.attention_mass_mixed,
        }

    def __call__(
        self,
        query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        layout: PagedLayout,
        sequence: int,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See selection.attention_mass."""
        num_kv_heads, _, head_dim = k_cache.shape
        function = self._functions.get((query.dtype, k_cache.dtype))
        if function is None or num_kv_heads == 0 or head_dim % _LANES or query.stride(2) != 1:
            return selection.attention_mass(query, k_cache, layout, sequence, scaling, softcap)
        num_keys = layout.context_lens[sequence] + layout.query_lens[sequence]
        table = np.ascontiguousarray(layout.block_tables[sequence], dtype=np.int64)
        mass = torch.empty(num_kv_heads, num_keys)
        call = MassCall(
            query=query.data_ptr(),
            keys=k_cache.data_ptr(),
            mass=mass.data_ptr(),
            table=table.ctypes.data,
            num_rows=query.shape[1],
            num_keys=num_keys,
            block_size=layout.block_size,
            query_head_stride=query.stride(0),
            query_row_stride=query.stride(1),
            kv_head_stride=k_cache.stride(0),
            num_query_heads=query.shape[0],
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scaling=scaling,
            softcap=softcap or 0.0,
            num_threads=torch.get_num_threads(),
        )
        function(ctypes.byref(call))
        return mass
