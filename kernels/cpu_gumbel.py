"""Choosing tokens by the C++ kernel of kernels/cpu: the same words, and noise within 2 ulp."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from magicdec.kernels import gumbel
from magicdec.kernels.gumbel import Draw

_POINTER = ctypes.c_void_p


class ChoiceCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("scores", "keys", "chosen")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_entries")),
        ("num_threads", ctypes.c_int32),
    )


class CpuGumbelArgmax:
    """gumbel.gumbel_argmax over one compiled library, for fp32 rows on the CPU; others go there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.gumbel_argmax

    def __call__(self, scores: torch.Tensor, draws: Sequence[Draw | None]) -> list[int]:
        """See gumbel.gumbel_argmax."""
        is_known = scores.dtype is torch.float32 and scores.device.type == "cpu"
        if not is_known or len(draws) != len(scores):
            return gumbel.gumbel_argmax(scores, draws)
        scores = scores.contiguous()
        keys = gumbel.draw_keys(draws)
        chosen = np.empty(len(draws), dtype=np.int64)
        call = ChoiceCall(
            scores=scores.data_ptr(),
            keys=keys.ctypes.data,
            chosen=chosen.ctypes.data,
            num_rows=len(draws),
            num_entries=scores.shape[1],
            num_threads=torch.get_num_threads(),
        )
        self._function(ctypes.byref(call))
        if (chosen < 0).any():
            raise ValueError(gumbel.unordered(int(np.argmin(chosen))))
        return chosen.tolist()
