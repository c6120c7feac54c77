"""The largest entries of rows, from the C++ kernel of kernels/cpu."""

import ctypes

import torch

from magicdec.kernels import selection

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class LargestCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("scores", "indices")),
        *((name, _INT) for name in ("num_rows", "num_entries", "row_stride", "count")),
        ("num_threads", ctypes.c_int32),
    )


class CpuLargest:
    """selection.largest_indices over one compiled library; what it does not know goes there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.largest_indices

    def __call__(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """See selection.largest_indices."""
        if scores.dtype is not torch.float32 or scores.stride(1) != 1:
            return selection.largest_indices(scores, count)
        num_rows, num_entries = scores.shape
        indices = torch.empty(num_rows, count, dtype=torch.long)
        call = LargestCall(
            scores=scores.data_ptr(),
            indices=indices.data_ptr(),
            num_rows=num_rows,
            num_entries=num_entries,
            row_stride=scores.stride(0),
            count=count,
            num_threads=torch.get_num_threads(),
        )
        self._function(ctypes.byref(call))
        return indices
