"""Choosing tokens by the C++ kernel of kernels/cpu: the same words, and noise within 2 ulp."""

import ctypes
from collections.abc import Sequence

import torch

from magicdec.kernels import gumbel
from magicdec.kernels.gumbel import Draw, Winners

_POINTER = ctypes.c_void_p


class ChoiceCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("scores", "keys", "values", "entries")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_entries", "first_entry")),
        ("num_threads", ctypes.c_int32),
    )


class CpuGumbelArgmax:
    """gumbel.gumbel_argmax over one compiled library, for fp32 rows on the CPU; others go there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.gumbel_argmax

    def __call__(
        self, scores: torch.Tensor, draws: Sequence[Draw | None], first_entry: int = 0
    ) -> Winners:
        """See gumbel.gumbel_argmax."""
        if scores.dtype is not torch.float32 or scores.device.type != "cpu":
            return gumbel.gumbel_argmax(scores, draws, first_entry)
        gumbel.check_draws(scores, draws, first_entry)
        scores = scores.contiguous()
        keys = gumbel.draw_keys(draws)
        values = torch.empty(len(draws), dtype=torch.float64)
        entries = torch.empty(len(draws), dtype=torch.int64)
        call = ChoiceCall(
            scores=scores.data_ptr(),
            keys=keys.ctypes.data,
            values=values.data_ptr(),
            entries=entries.data_ptr(),
            num_rows=len(draws),
            num_entries=scores.shape[1],
            first_entry=first_entry,
            num_threads=torch.get_num_threads(),
        )
        self._function(ctypes.byref(call))
        return Winners(values, entries)
