"""Linears over bfloat16 weights laid out for vectors, of fp32 rows or bfloat16 ones."""

import ctypes

import torch
from torch import nn

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class LinearCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "weight", "bias", "output")),
        *((name, _INT) for name in ("num_rows", "num_inputs", "num_outputs")),
        ("num_threads", ctypes.c_int32),
    )


class PackedLinear(nn.Module):
    """x @ weight.T + bias, the weight in bfloat16 and rows in the dtype that the linear had.

    Products are exact and sums fp32, in an order that the rows beside a row do not change.
    """

    packed: torch.Tensor  # bfloat16 [num_outputs / width, num_inputs / 2, width, 2]
    bias: torch.Tensor | None  # fp32, with room for a last block of outputs

    def __init__(self, linear: nn.Linear, library: ctypes.CDLL) -> None:
        """Rounds the weight to bfloat16. Raises ValueError for an odd number of inputs.

        KeyError for a weight that is neither fp32 nor bfloat16.
        """
        super().__init__()
        if linear.in_features % 2:
            raise ValueError(f"num_inputs must be even, got {linear.in_features}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        width = library.linear_width()
        padding = -linear.out_features % width
        weight = nn.functional.pad(linear.weight.detach().bfloat16(), (0, 0, 0, padding))
        pairs = weight.view(-1, width, linear.in_features // 2, 2)
        self.register_buffer("packed", pairs.transpose(1, 2).contiguous())
        bias = None
        if linear.bias is not None:
            bias = nn.functional.pad(linear.bias.detach().float(), (0, padding))
        self.register_buffer("bias", bias)
        self._dtype = linear.weight.dtype
        self._function = {
            torch.float32: library.linear_float32,
            torch.bfloat16: library.linear_bfloat16,
        }[self._dtype]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., num_inputs] -> [..., num_outputs]. Raises TypeError for rows of another dtype."""
        if rows.dtype is not self._dtype:
            raise TypeError(f"rows of this packed linear must be {self._dtype}, got {rows.dtype}")
        rows = rows.contiguous()
        output = rows.new_empty(*rows.shape[:-1], self.out_features)
        call = LinearCall(
            rows=rows.data_ptr(),
            weight=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            output=output.data_ptr(),
            num_rows=rows.numel() // self.in_features,
            num_inputs=self.in_features,
            num_outputs=self.out_features,
            num_threads=torch.get_num_threads(),
        )
        self._function(ctypes.byref(call))
        return output


def pack_linears(module: nn.Module, library: ctypes.CDLL) -> None:
    """Replaces every nn.Linear below the module whose inputs are even in number."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % 2 == 0:
                setattr(parent, name, PackedLinear(child, library))
