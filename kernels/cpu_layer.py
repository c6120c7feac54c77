"""A decoder layer around its attention, by the C++ kernels of kernels/cpu: a call before it and one
after."""

import ctypes
from dataclasses import dataclass

import torch

from magicdec.kernels.cpu_linear import PackedLinear
from magicdec.kernels.head_norms import HeadNorms

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LayerWeights(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "attention_norm", "head_norms")),
        *((name, _POINTER) for name in ("qkv", "attended", "gate_up", "down")),
        *((f"{name}_bias", _POINTER) for name in ("qkv", "attended", "gate_up", "down")),
        *((name, _INT) for name in ("hidden_size", "num_heads", "num_turned", "head_dim")),
        *((name, _INT) for name in ("attended_size", "gate_size")),
        *((f"{name}_epsilon", _FLOAT) for name in ("input", "attention", "head")),
    )


class LayerStartCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "cos", "sin", "output")),
        ("num_rows", _INT),
        ("num_threads", ctypes.c_int32),
    )


class LayerEndCall(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "residual", "output")),
        ("num_rows", _INT),
        ("num_threads", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """rms_norm's arguments beside the rows."""

    weight: torch.Tensor  # [hidden_size]
    epsilon: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a decoder layer is made of, all of one dtype; norms of heads where it has any."""

    input_norm: Norm
    attention_norm: Norm
    qkv: PackedLinear  # query, key and value side by side
    attended: PackedLinear  # attention's output projection
    gate_up: PackedLinear  # gates, then what they let through
    down: PackedLinear
    num_heads: int  # of query, key and value
    num_turned: int  # those of query and key
    head_dim: int
    head_norms: HeadNorms | None = None


class CpuLayer:
    """Of one compiled library: what each step by itself would give, bit for bit.

    Raises KeyError for norms that are neither fp32 nor bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, parts: LayerParts) -> None:
        self._parts = parts  # holds what the pointers are to
        self._weights = _weights(parts)
        self._start, self._end = {
            torch.float32: (library.start_layer_float32, library.end_layer_float32),
            torch.bfloat16: (library.start_layer_bfloat16, library.end_layer_bfloat16),
        }[parts.input_norm.weight.dtype]

    def start(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Query, key and value, [num_rows, num_heads, head_dim], of the layer's input
        [num_rows, hidden_size] and the turns of its rows, [num_rows, head_dim] each; contiguous."""
        parts = self._parts
        output = rows.new_empty(len(rows), parts.num_heads, parts.head_dim)
        call = LayerStartCall(
            rows.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            output.data_ptr(),
            len(rows),
            torch.get_num_threads(),
        )
        self._start(ctypes.byref(self._weights), ctypes.byref(call))
        return output

    def end(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The layer's output, [num_rows, hidden_size], of what attention gave, [num_rows, heads x
        head_dim], and the layer's input; contiguous."""
        output = torch.empty_like(residual)
        call = LayerEndCall(
            attended.data_ptr(),
            residual.data_ptr(),
            output.data_ptr(),
            len(residual),
            torch.get_num_threads(),
        )
        self._end(ctypes.byref(self._weights), ctypes.byref(call))
        return output


def _weights(parts: LayerParts) -> LayerWeights:
    linears = {
        "qkv": parts.qkv,
        "attended": parts.attended,
        "gate_up": parts.gate_up,
        "down": parts.down,
    }
    biases = {name: linear.bias for name, linear in linears.items() if linear.bias is not None}
    weights = LayerWeights(
        input_norm=parts.input_norm.weight.data_ptr(),
        attention_norm=parts.attention_norm.weight.data_ptr(),
        **{name: linear.packed.data_ptr() for name, linear in linears.items()},
        **{f"{name}_bias": bias.data_ptr() for name, bias in biases.items()},
        hidden_size=parts.qkv.in_features,
        num_heads=parts.num_heads,
        num_turned=parts.num_turned,
        head_dim=parts.head_dim,
        attended_size=parts.attended.in_features,
        gate_size=parts.down.in_features,
        input_epsilon=parts.input_norm.epsilon,
        attention_epsilon=parts.attention_norm.epsilon,
    )
    if parts.head_norms is not None:
        weights.head_norms = parts.head_norms.weights.data_ptr()
        weights.head_epsilon = parts.head_norms.epsilon
    return weights
