"""Linears whose weights stay in bfloat16 where the processor computes in fp32 alone."""

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
    """x @ weight.T + bias for fp32 rows, the weight in bfloat16: half the bytes of an fp32 one.

    Products are exact and sums fp32, in an order that the rows beside a row do not change.
    """

    packed: torch.Tensor  # bfloat16 [num_outputs / width, num_inputs / 2, width, 2]
    bias: torch.Tensor | None  # fp32, with room for a last block of outputs

    def __init__(self, linear: nn.Linear, library: ctypes.CDLL) -> None:
        """Rounds the weight to bfloat16. Raises ValueError for an odd number of inputs."""
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
        self._function = library.linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., num_inputs] -> [..., num_outputs], fp32. Raises TypeError for rows that are not."""
        if rows.dtype is not torch.float32:
            raise TypeError(f"rows of a packed linear must be float32, got {rows.dtype}")
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
