"""Layers whose small steps are compiled: one call in place of ten where nothing changes by it.

A module is known by the names of its parts and replaced only if, on made-up rows, what stands for
it gives the same numbers; what is not known, or differs, stays as transformers has it. One linear
takes the place of several that read the same rows.
"""

import ctypes
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from magicdec.attention import ATTENTION_NAME, AttentionContext, register_attention
from magicdec.kernels.cpu_elementwise import DIMS_MULTIPLE, CpuElementwise

logger = logging.getLogger(__name__)

_NUM_ROWS = 5  # of a trial
_TOLERANCE = 1e-4  # of the largest number: fp32 sums in another order


class FusedRmsNorm(nn.Module):
    """Any RMSNorm, whatever it makes of its weight: `weight` is what rows are multiplied with."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, epsilon: float, kernels: CpuElementwise) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self._epsilon = epsilon
        self._kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(rows, self.weight, self._epsilon)


class FusedMlp(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))"""

    def __init__(self, mlp: Any, kernels: CpuElementwise) -> None:
        super().__init__()
        self.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj
        self._kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self._kernels.silu_product(self.gate_up_proj(rows)))
        return output


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an attention module asks of its context."""

    layer: int
    states: tuple[torch.Tensor, ...]  # query, key, value
    limits: dict[str, float | int | None]  # scaling, sliding_window, softcap


class _Recorder:
    """An AttentionContext that answers with the query."""

    def __init__(self) -> None:
        self.asked: list[_Asked] = []

    def attend(self, layer: int, *states: torch.Tensor, **limits: float | int | None) -> Any:
        self.asked.append(_Asked(layer, states, limits))
        return states[0]


class FusedAttention(nn.Module):
    """One linear for query, key and value, then the rotation, then the context."""

    def __init__(self, attention: Any, asked: _Asked, kernels: CpuElementwise) -> None:
        super().__init__()
        self.qkv_proj = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        query, key, _ = asked.states
        self._layer, self._limits = asked.layer, asked.limits
        self._num_heads, self._num_kv_heads, self._head_dim = len(query), len(key), query.shape[2]
        self._kernels = kernels

    def forward(
        self,
        hidden_states: torch.Tensor,  # [1, num_rows, hidden_size]
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # [1, num_rows, head_dim] each
        *,
        attention_context: AttentionContext,
        **ignored: object,
    ) -> tuple[torch.Tensor, None]:
        cos, sin = position_embeddings
        rows: torch.Tensor = self.qkv_proj(hidden_states[0])
        num_rotated = self._num_heads + self._num_kv_heads
        rows = self._kernels.rotate(rows, cos[0], sin[0], num_rotated)
        heads = rows.view(len(rows), -1, self._head_dim).transpose(0, 1)
        sizes = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        query, key, value = heads.split_with_sizes(sizes)
        limits: Any = self._limits
        output = attention_context.attend(self._layer, query, key, value, **limits)
        output = output.transpose(0, 1).reshape(1, len(rows), -1)
        return self.o_proj(output), None


@torch.inference_mode()
def fuse_modules(model: Any, library: ctypes.CDLL) -> None:
    """Replaces what may be replaced below an fp32 model of transformers on the CPU."""
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    kernels = CpuElementwise(library)
    num_fused = num_left = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fuse = _fusion_of(child)
            if fuse is None:
                continue
            fused = fuse(child, kernels)
            num_left += fused is None
            if fused is not None:
                num_fused += 1
                setattr(parent, name, fused)
    logger.info("%d norms, MLPs and attentions fused, %d left as they are", num_fused, num_left)


def _fusion_of(module: nn.Module) -> Any:
    """None: not of a kind that is known."""
    children = dict(module.named_children())
    if type(module).__name__.endswith("RMSNorm") and not children:
        return _fused_norm
    linears = {name for name, child in children.items() if type(child) is nn.Linear}
    if linears == {"gate_proj", "up_proj", "down_proj"} and children.keys() - linears == {"act_fn"}:
        return _fused_mlp
    if linears == children.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return _fused_attention
    return None


def _fused_norm(norm: Any, kernels: CpuElementwise) -> nn.Module | None:
    settings = vars(norm)
    epsilon = settings.get("variance_epsilon", settings.get("eps"))
    weight = norm._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or len(weight) % DIMS_MULTIPLE:
        return None
    ones = torch.ones(1, len(weight))
    fused = FusedRmsNorm(norm(ones)[0] * (1.0 + epsilon) ** 0.5, epsilon, kernels)
    rows = _made_up(len(weight))
    return fused if _agree(fused(rows), norm(rows)) else None


def _fused_mlp(mlp: Any, kernels: CpuElementwise) -> nn.Module | None:
    if mlp.gate_proj.out_features % DIMS_MULTIPLE:
        return None
    fused, rows = FusedMlp(mlp, kernels), _made_up(mlp.gate_proj.in_features)
    return fused if _agree(fused(rows), mlp(rows)) else None


def _fused_attention(attention: Any, kernels: CpuElementwise) -> nn.Module | None:
    head_dim = vars(attention).get("head_dim")
    if not isinstance(head_dim, int) or head_dim % DIMS_MULTIPLE:
        return None
    rows, angles = _made_up(attention.q_proj.in_features), _made_up(head_dim // 2).repeat(1, 1, 2)
    turns, expected, actual = (angles.cos(), angles.sin()), _Recorder(), _Recorder()
    try:
        output, _ = attention(
            hidden_states=rows,
            position_embeddings=turns,
            attention_mask=None,
            attention_context=expected,
        )
    except TypeError:  # it is called in another way
        return None
    (asked,) = expected.asked
    fused = FusedAttention(attention, asked, kernels)
    found, _ = fused(rows, turns, attention_context=actual)
    pairs = zip(actual.asked[0].states, asked.states, strict=True)
    same = _agree(found, output) and all(_agree(one, other) for one, other in pairs)
    return fused if same else None


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """Their outputs side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def _made_up(num_dims: int) -> torch.Tensor:
    """[1, num_rows, num_dims]"""
    return torch.randn(1, _NUM_ROWS, num_dims, generator=torch.Generator().manual_seed(0))


def _agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    within = _TOLERANCE * float(expected.abs().max())
    return actual.shape == expected.shape and bool(((actual - expected).abs() <= within).all())
