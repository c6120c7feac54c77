"""Choosing tokens by the C++ kernel of kernels/cpu: the same words, and noise within 2 ulp."""

import ctypes
from collections.abc import Sequence

import torch

from magicdec.kernels import gumbel
from magicdec.kernels.gumbel import Draw, Scaling, Winners

_POINTER = ctypes.c_void_p


class ChoiceCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("scores", "greatest", "temperatures")),
        *((name, _POINTER) for name in ("keys", "values", "entries")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_entries", "first_entry")),
        ("num_threads", ctypes.c_int32),
    )


class CpuGumbelArgmax:
    """gumbel.gumbel_argmax over one compiled library, for rows on the CPU in fp32 or bfloat16;
    others go there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {
            torch.float32: library.gumbel_argmax_float32,
            torch.bfloat16: library.gumbel_argmax_bfloat16,
        }

    def __call__(
        self,
        scores: torch.Tensor,
        draws: Sequence[Draw | None],
        first_entry: int = 0,
        scaling: Scaling | None = None,
    ) -> Winners:
        """See gumbel.gumbel_argmax."""
        function = self._functions.get(scores.dtype)
        if function is None or scores.device.type != "cpu":
            return gumbel.gumbel_argmax(scores, draws, first_entry, scaling)
        gumbel.check_draws(scores, draws, first_entry)
        scores = scores.contiguous()
        keys = gumbel.draw_keys(draws)
        values = torch.empty(len(draws), dtype=torch.float64)
        entries = torch.empty(len(draws), dtype=torch.int64)
        call = ChoiceCall(
            scores=scores.data_ptr(),
            greatest=None if scaling is None else scaling.greatest.data_ptr(),
            temperatures=None if scaling is None else scaling.temperatures.data_ptr(),
            keys=keys.ctypes.data,
            values=values.data_ptr(),
            entries=entries.data_ptr(),
            num_rows=len(draws),
            num_entries=scores.shape[1],
            first_entry=first_entry,
            num_threads=torch.get_num_threads(),
        )
        function(ctypes.byref(call))
        return Winners(values, entries)
