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
# Sums in another order, as shares of the largest number: of any difference, and of their mean. In
# bfloat16 a few numbers are rounded the other way; steps rounded elsewhere would show in the mean.
_TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2**-6, 1e-4)}


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
    """Replaces what may be replaced below a model of transformers on the CPU, fp32 or bfloat16."""
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    # Of what the model turns by: half of it, where only a part of each head rotates.
    buffers = model.named_buffers()
    turned = {2 * len(buffer) for name, buffer in buffers if name.endswith("inv_freq")}
    found = _fuse_below(model, turned, CpuElementwise(library, model.dtype))
    kinds = (FusedRmsNorm, FusedMlp, FusedAttention)
    counts = ", ".join(f"{found.count(kind)} {kind.__name__}" for kind in kinds)
    logger.info("%s; %d left as they are", counts, found.count(None))


def _fuse_below(
    parent: nn.Module, turned: set[int], kernels: CpuElementwise
) -> list[type[nn.Module] | None]:
    """What became of each module of a known kind; one goes before the next is made."""
    found: list[type[nn.Module] | None] = []
    for name, child in list(parent.named_children()):
        fuse = _fusion_of(child)
        if fuse is None:
            found += _fuse_below(child, turned, kernels)
            continue
        fused = _tried(fuse, child, turned, kernels)
        found.append(None if fused is None else type(fused))
        if fused is not None:
            setattr(parent, name, fused)
    return found


def _tried(fuse: Any, module: Any, turned: set[int], kernels: CpuElementwise) -> nn.Module | None:
    """None where the trial fails, in whatever way: what is called otherwise is not what we know."""
    try:
        fused: nn.Module | None = fuse(module, turned, kernels)
    except Exception as error:
        logger.info("%s stays as it is: %s", type(module).__name__, error)
        return None
    return fused


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


def _fused_norm(norm: Any, turned: set[int], kernels: CpuElementwise) -> nn.Module | None:
    settings = vars(norm)
    epsilon = settings.get("variance_epsilon", settings.get("eps"))
    weight = norm._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or len(weight) % DIMS_MULTIPLE:
        return None
    ones = torch.ones(1, len(weight), dtype=kernels.dtype)
    fused = FusedRmsNorm(norm(ones)[0] * (1.0 + epsilon) ** 0.5, epsilon, kernels)
    same = all(_agree(fused(rows), norm(rows)) for rows in _trials(len(weight), kernels.dtype))
    return fused if same else None


def _fused_mlp(mlp: Any, turned: set[int], kernels: CpuElementwise) -> nn.Module | None:
    if mlp.gate_proj.out_features % DIMS_MULTIPLE:
        return None
    fused, trials = FusedMlp(mlp, kernels), _trials(mlp.gate_proj.in_features, kernels.dtype)
    return fused if all(_agree(fused(rows), mlp(rows)) for rows in trials) else None


def _fused_attention(attention: Any, turned: set[int], kernels: CpuElementwise) -> nn.Module | None:
    head_dim = vars(attention).get("head_dim")
    if not isinstance(head_dim, int) or head_dim % DIMS_MULTIPLE or turned != {head_dim}:
        return None
    angles = _made_up(head_dim // 2).repeat(1, 1, 2)
    turns = angles.cos().to(kernels.dtype), angles.sin().to(kernels.dtype)
    fused = None
    for rows in _trials(attention.q_proj.in_features, kernels.dtype):
        expected, actual = _Recorder(), _Recorder()
        output, _ = attention(
            hidden_states=rows,
            position_embeddings=turns,
            attention_mask=None,
            attention_context=expected,
        )
        (asked,) = expected.asked
        fused = fused or FusedAttention(attention, asked, kernels)
        found, _ = fused(rows, turns, attention_context=actual)
        pairs = zip(actual.asked[0].states, asked.states, strict=True)
        if not (_agree(found, output) and all(_agree(one, other) for one, other in pairs)):
            return None
    return fused


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """Their outputs side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def _trials(num_dims: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows of usual size, and such as meet whatever limits a module may set."""
    rows = _made_up(num_dims).to(dtype)
    return [rows, 1000.0 * rows]


def _made_up(num_dims: int) -> torch.Tensor:
    """[1, num_rows, num_dims]"""
    return torch.randn(1, _NUM_ROWS, num_dims, generator=torch.Generator().manual_seed(0))


def _agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    differences = (actual.float() - expected.float()).abs()
    each, mean = _TOLERANCES[expected.dtype]
    largest = float(expected.abs().max())
    return bool(differences.max() <= each * largest and differences.mean() <= mean * largest)
