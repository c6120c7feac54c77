"""Layers whose small steps are compiled: one call in place of ten where nothing changes by it.

A module is known by the names of its parts and replaced only if, on made-up rows, what stands for
it gives the same numbers; what is not known, or differs, stays as transformers has it. One linear
takes the place of several that read the same rows.
"""

import logging
from typing import Any

import torch
from torch import nn

from magicdec.attention import ATTENTION_NAME, register_attention
from magicdec.few_rows import serve_few_rows
from magicdec.fused_layers import (
    Asked,
    FusedAttention,
    FusedDecoderLayer,
    FusedMlp,
    FusedRmsNorm,
)
from magicdec.kernels.cpu_elementwise import DIMS_MULTIPLE
from magicdec.kernels.heads import Heads
from magicdec.kernels.kv_store import store_kv
from magicdec.kernels.layer_dispatch import Elementwise, select_few_row_linears
from magicdec.kernels.linear_trials import ColdTimer

logger = logging.getLogger(__name__)

_NUM_ROWS = 5  # of a trial
_NORMS = ("q_norm", "k_norm")  # that an attention may have
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Sums in another order, as shares of the largest number: of any difference, and of their mean. In
# bfloat16 a few numbers are rounded the other way; steps rounded elsewhere would show in the mean.
_TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2**-6, 1e-4)}
_SPLIT_SUMS = 10.0  # times as much of the mean where a GPU sums products otherwise by their shape


class _Recorder:
    """An AttentionContext that answers with the query; of states like these, whose K/V it has put
    into pages."""

    def __init__(self, paged: tuple[torch.Tensor, ...] | None = None) -> None:
        self._paged = paged
        self.asked: list[Asked] = []

    def attend(self, layer: int, heads: Heads, **limits: float | int | None) -> Any:
        states: tuple[torch.Tensor, ...]
        if self._paged is None:
            states = heads.rotated()
        else:
            k_cache, v_cache = (state.new_zeros(state.shape) for state in self._paged[1:])
            slots = torch.arange(k_cache.shape[1], device=k_cache.device)
            states = heads.stored(store_kv, k_cache, v_cache, slots), k_cache, v_cache
        self.asked.append(Asked(layer, states, limits))
        return states[0]


@torch.inference_mode()
def fuse_modules(model: Any, kernels: Elementwise) -> None:
    """Replaces what may be replaced below a model of transformers on the kernels' device, then the
    linears that are left, where few rows have a kernel."""
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    # Of what the model turns by: half of it, where only a part of each head rotates.
    buffers = model.named_buffers()
    turned = {2 * len(buffer) for name, buffer in buffers if name.endswith("inv_freq")}
    found = _fuse_below(model, turned, kernels)
    kinds = (FusedRmsNorm, FusedMlp, FusedAttention, FusedDecoderLayer)
    counts = ", ".join(f"{found.count(kind)} {kind.__name__}" for kind in kinds)
    logger.info("%s; %d left as they are", counts, found.count(None))
    linears = select_few_row_linears(kernels.device, kernels.dtype)
    if linears is not None:
        serve_few_rows(model, linears, kernels, ColdTimer(kernels.device))


def _fuse_below(
    parent: nn.Module, turned: set[int], kernels: Elementwise
) -> list[type[nn.Module] | None]:
    """What became of each module of a known kind; one goes before the next is made."""
    found: list[type[nn.Module] | None] = []
    for name, child in list(parent.named_children()):
        fuse = _fusion_of(child)
        if fuse is None:
            found += _fuse_below(child, turned, kernels)
            fuse = _fusion_around(child)
        if fuse is None:
            continue
        fused = _tried(fuse, child, turned, kernels)
        found.append(None if fused is None else type(fused))
        if fused is not None:
            setattr(parent, name, fused)
    return found


def _tried(fuse: Any, module: Any, turned: set[int], kernels: Elementwise) -> nn.Module | None:
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
    if linears == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return _fused_attention if children.keys() - linears in (set(), set(_NORMS)) else None
    return None


def _fusion_around(module: nn.Module) -> Any:
    """The same of a module whose parts have been replaced."""
    parts = dict(module.named_children())
    if parts.keys() != _LAYER or type(parts["self_attn"]) is not FusedAttention:
        return None
    return _fused_layer if type(parts["post_attention_layernorm"]) is FusedRmsNorm else None


def _fused_norm(norm: Any, turned: set[int], kernels: Elementwise) -> FusedRmsNorm | None:
    settings = vars(norm)
    epsilon = settings.get("variance_epsilon", settings.get("eps"))
    weight = norm._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or len(weight) % DIMS_MULTIPLE:
        return None
    ones = torch.ones(1, len(weight), dtype=kernels.dtype, device=kernels.device)
    fused = FusedRmsNorm(norm(ones)[0] * (1.0 + epsilon) ** 0.5, epsilon, kernels)
    same = all(_agree(fused(rows), norm(rows)) for rows in _trials(len(weight), kernels))
    return fused if same else None


def _fused_mlp(mlp: Any, turned: set[int], kernels: Elementwise) -> nn.Module | None:
    if mlp.gate_proj.out_features % DIMS_MULTIPLE:
        return None
    fused, trials = FusedMlp(mlp, kernels), _trials(mlp.gate_proj.in_features, kernels)
    return fused if all(_agree(fused(rows), mlp(rows), True) for rows in trials) else None


def _fused_attention(attention: Any, turned: set[int], kernels: Elementwise) -> nn.Module | None:
    head_dim = vars(attention).get("head_dim")
    if not isinstance(head_dim, int) or head_dim % DIMS_MULTIPLE or turned != {head_dim}:
        return None
    turns = _turns(head_dim, kernels)
    children = dict(attention.named_children())
    found = [_fused_norm(children[name], turned, kernels) for name in _NORMS if name in children]
    norms = [norm for norm in found if norm is not None]
    if len(norms) < len(found) or len({norm.epsilon for norm in norms}) > 1:
        return None
    fused = None
    for rows in _trials(attention.q_proj.in_features, kernels):
        expected = _Recorder()
        output, _ = attention(
            hidden_states=rows,
            position_embeddings=turns,
            attention_mask=None,
            attention_context=expected,
        )
        (asked,) = expected.asked
        fused = fused or FusedAttention(attention, asked, norms, kernels)
        for actual in (_Recorder(), _Recorder(asked.states)):
            result, _ = fused(rows, turns, attention_context=actual)
            theirs, ours = (output, *asked.states), (result, *actual.asked[0].states)
            if not all(_agree(one, other, True) for one, other in zip(ours, theirs, strict=True)):
                return None
    return fused


def _fused_layer(layer: Any, turned: set[int], kernels: Elementwise) -> nn.Module | None:
    (head_dim,) = turned  # or its attention were not fused
    fused, turns = FusedDecoderLayer(layer), _turns(head_dim, kernels)
    for rows in _trials(len(layer.post_attention_layernorm.weight), kernels):
        expected, found = (
            each(rows, position_embeddings=turns, attention_context=_Recorder())
            for each in (layer, fused)
        )
        if not _agree(found, expected, True):
            return None
    return fused


def _turns(head_dim: int, kernels: Elementwise) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of a trial's rows, [1, num_rows, head_dim] each."""
    angles = _made_up(head_dim // 2).repeat(1, 1, 2)
    return tuple(turn.to(kernels.device, kernels.dtype) for turn in (angles.cos(), angles.sin()))


def _trials(num_dims: int, kernels: Elementwise) -> list[torch.Tensor]:
    """Rows of usual size, and such as meet whatever limits a module may set."""
    rows = _made_up(num_dims).to(kernels.device, kernels.dtype)
    return [rows, 1000.0 * rows]


def _made_up(num_dims: int) -> torch.Tensor:
    """[1, num_rows, num_dims]"""
    return torch.randn(1, _NUM_ROWS, num_dims, generator=torch.Generator().manual_seed(0))


def _agree(actual: torch.Tensor, expected: torch.Tensor, multiplies: bool = False) -> bool:
    if actual.shape != expected.shape:
        return False
    differences = (actual.float() - expected.float()).abs()
    each, mean = _TOLERANCES[expected.dtype]
    if multiplies and expected.is_cuda:
        mean *= _SPLIT_SUMS
    largest = float(expected.abs().max())
    return bool(differences.max() <= each * largest and differences.mean() <= mean * largest)
