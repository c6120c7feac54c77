"""What stands between a layer's linears, by the C++ kernels of kernels/cpu, a call each."""

import ctypes

import torch

from magicdec.kernels.head_norms import HeadNorms

DIMS_MULTIPLE = 32  # of heads that rotate; norms and gates are content with half of it
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class NormCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "residual", "summed", "weight", "output")),
        *((name, _INT) for name in ("num_rows", "num_dims")),
        ("epsilon", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class RotateCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "cos", "sin", "norm_weights")),
        *((name, _INT) for name in ("num_rows", "row_stride", "num_heads", "head_dim")),
        ("epsilon", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class GateCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "output")),
        *((name, _INT) for name in ("num_rows", "num_dims")),
        ("num_threads", ctypes.c_int32),
    )


class CpuElementwise:
    """Of one compiled library and one dtype, fp32 or bfloat16.

    Tensors are of that dtype and contiguous, dims multiples of DIMS_MULTIPLE. Raises KeyError for
    another dtype.
    """

    rotate_and_store = None  # see Elementwise

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        self._norm, self._rotate, self._gate = {
            torch.float32: (
                library.rms_norm_float32,
                library.rotate_float32,
                library.silu_product_float32,
            ),
            torch.bfloat16: (
                library.rms_norm_bfloat16,
                library.rotate_bfloat16,
                library.silu_product_bfloat16,
            ),
        }[dtype]

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See reference.rms_norm."""
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        self._norm(ctypes.byref(_norm_call(rows, weight, output, epsilon)))
        return output

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See reference.add_rms_norm."""
        rows, residual = rows.contiguous(), residual.contiguous()
        output, summed = torch.empty_like(rows), torch.empty_like(rows)
        call = _norm_call(rows, weight, output, epsilon)
        call.residual, call.summed = residual.data_ptr(), summed.data_ptr()
        self._norm(ctypes.byref(call))
        return output, summed

    def rotate(
        self,
        rows: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """See reference.rotate; `rows` themselves are rotated and returned."""
        cos, sin = cos.contiguous(), sin.contiguous()
        call = RotateCall(
            rows=rows.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            num_rows=rows.shape[0],
            row_stride=rows.shape[1],
            num_heads=num_heads,
            head_dim=cos.shape[1],
            num_threads=torch.get_num_threads(),
        )
        if norms is not None:
            call.norm_weights, call.epsilon = norms.weights.data_ptr(), norms.epsilon
        self._rotate(ctypes.byref(call))
        return rows

    def silu_product(self, rows: torch.Tensor) -> torch.Tensor:
        """See reference.silu_product."""
        rows = rows.contiguous()
        output = rows.new_empty(*rows.shape[:-1], rows.shape[-1] // 2)
        call = GateCall(
            rows=rows.data_ptr(),
            output=output.data_ptr(),
            num_rows=output.numel() // output.shape[-1],
            num_dims=output.shape[-1],
            num_threads=torch.get_num_threads(),
        )
        self._gate(ctypes.byref(call))
        return output


def _norm_call(
    rows: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, epsilon: float
) -> NormCall:
    return NormCall(
        rows=rows.data_ptr(),
        weight=weight.data_ptr(),
        output=output.data_ptr(),
        num_rows=rows.numel() // rows.shape[-1],
        num_dims=rows.shape[-1],
        epsilon=epsilon,
        num_threads=torch.get_num_threads(),
    )
