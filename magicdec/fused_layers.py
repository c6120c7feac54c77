"""What stands for a layer's modules where its small steps are compiled (fused_modules.py)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from magicdec.attention import AttentionContext
from magicdec.kernels.head_norms import HeadNorms
from magicdec.kernels.heads import Heads, RotatedHeads
from magicdec.kernels.kv_store import StoreKv
from magicdec.kernels.layer_dispatch import Elementwise, FewRowLinears


class FusedRmsNorm(nn.Module):
    """Any RMSNorm, whatever it makes of its weight: `weight` is what rows are multiplied with."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, epsilon: float, kernels: Elementwise) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.epsilon = epsilon
        self._kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(rows, self.weight, self.epsilon)

    def after_sum(
        self, rows: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the norm of their sum, and the sum."""
        return self._kernels.add_rms_norm(rows, residual, self.weight, self.epsilon)


class FewRowLinear(nn.Linear):
    """An nn.Linear, of its own weight, by a kernel where that is faster for so few rows."""

    def __init__(self, linear: nn.Linear, kernels: FewRowLinears, tiles: Collection[int]) -> None:
        """`tiles`: of FewRowLinears.tile_rows, those whose rows go to the kernel."""
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._kernels, self._tiles = kernels, tiles

    def takes(self, rows: torch.Tensor) -> bool:
        """Whether these rows go to the kernel."""
        num_rows = rows.numel() // self.in_features
        fits = self._kernels.fits(num_rows, self.weight)
        return fits and self._kernels.tile_rows(num_rows) in self._tiles

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.takes(rows):
            return self._kernels.linear(rows, self.weight, self.bias)
        return super().forward(rows)

    def summed(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Of rows that it `takes`: the residual and their linear."""
        return self._kernels.linear(rows, self.weight, self.bias, residual)

    def gated(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows that it `takes`: Elementwise.silu_product of their linear."""
        return self._kernels.gated_linear(rows, self.weight, self.bias)


class FusedMlp(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))"""

    def __init__(self, mlp: Any, kernels: Elementwise) -> None:
        super().__init__()
        self.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj: nn.Linear = mlp.down_proj
        self._kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self._gated(rows))
        return output

    def summed(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + forward(rows)"""
        gated, down = self._gated(rows), self.down_proj
        if isinstance(down, FewRowLinear) and down.takes(gated):
            return down.summed(gated, residual)
        output: torch.Tensor = residual + down(gated)
        return output

    def _gated(self, rows: torch.Tensor) -> torch.Tensor:
        linear = self.gate_up_proj
        if isinstance(linear, FewRowLinear) and linear.takes(rows):
            return linear.gated(rows)
        return self._kernels.silu_product(linear(rows))


@dataclass(frozen=True, slots=True)
class Asked:
    """What an attention module asks of its context."""

    layer: int
    states: tuple[torch.Tensor, ...]  # query, key, value, rotated
    limits: dict[str, float | int | None]  # scaling, sliding_window, softcap


class FusedAttention(nn.Module):
    """One linear for query, key and value, norms of their heads where it has any with the rotation,
    then the context."""

    norm_weights: torch.Tensor | None  # [heads that rotate, head_dim]

    def __init__(
        self,
        attention: Any,
        asked: Asked,
        norms: Sequence[FusedRmsNorm],  # of query and key, of one epsilon, or none
        kernels: Elementwise,
    ) -> None:
        super().__init__()
        self.qkv_proj = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        query, key, _ = asked.states
        self._layer, self._limits = asked.layer, asked.limits
        self.num_heads, self.num_kv_heads, self.head_dim = len(query), len(key), query.shape[2]
        self._head_counts = counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        parts = [norm.weight.expand(n, -1) for norm, n in zip(norms, counts, strict=False)]
        self.register_buffer("norm_weights", torch.cat(parts) if parts else None)
        self._epsilon = norms[0].epsilon if norms else 0.0
        self.kernels = kernels

    def forward(
        self,
        hidden_states: torch.Tensor,  # [1, num_rows, hidden_size]
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # [1, num_rows, head_dim] each
        *,
        attention_context: AttentionContext,
        **ignored: object,
    ) -> tuple[torch.Tensor, None]:
        rows: torch.Tensor = self.qkv_proj(hidden_states[0])
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        heads = _UnrotatedHeads(rows, cos, sin, self)
        return self.o_proj(self.attend(heads, attention_context)[None]), None

    @property
    def head_norms(self) -> HeadNorms | None:
        weights = self.norm_weights
        return None if weights is None else HeadNorms(weights, self._epsilon)

    def split(self, heads: torch.Tensor) -> RotatedHeads:
        """Of query, key and value, rotated: [heads, num_rows, head_dim]."""
        return RotatedHeads(*heads.split_with_sizes(self._head_counts))

    def attend(self, heads: Heads, context: AttentionContext) -> torch.Tensor:
        """[num_rows, num_heads x head_dim]"""
        limits: Any = self._limits
        output = context.attend(self._layer, heads, **limits)
        return output.transpose(0, 1).reshape(output.shape[1], -1)


@dataclass(frozen=True, slots=True)
class _UnrotatedHeads:
    """Heads as the linear leaves them, of which each context gets what it asks for in one call of
    a kernel, where there is one."""

    rows: torch.Tensor  # [num_rows, heads x head_dim], rotated where they lie
    cos: torch.Tensor  # [num_rows, head_dim]
    sin: torch.Tensor
    attention: FusedAttention

    def rotated(self) -> RotatedHeads:
        """See Heads."""
        attention = self.attention
        num_turned = attention.num_heads + attention.num_kv_heads
        rotate = attention.kernels.rotate
        return self._split(rotate(self.rows, self.cos, self.sin, num_turned, attention.head_norms))

    def stored(
        self,
        store: StoreKv,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See Heads."""
        both = self.attention.kernels.rotate_and_store
        pages = k_cache, v_cache, slot_mapping
        if both is None:
            return self.rotated().stored(store, *pages)
        both(self.rows, self.cos, self.sin, *pages, self.attention.head_norms)
        return self._split(self.rows).query

    def _split(self, rows: torch.Tensor) -> RotatedHeads:
        attention = self.attention
        return attention.split(rows.view(len(rows), -1, attention.head_dim).transpose(0, 1))


class FusedDecoderLayer(nn.Module):
    """Attention, then gates, each after a norm and beside a residual: the second norm is taken with
    the sum that it is of."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm: FusedRmsNorm = layer.post_attention_layernorm
        if "attention_type" in vars(layer):  # which of the model's masks it is given
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, summed = self.post_attention_layernorm.after_sum(attended, hidden_states)
        if isinstance(self.mlp, FusedMlp):
            return self.mlp.summed(normed, summed)
        gated: torch.Tensor = self.mlp(normed)
        return summed + gated


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """Their outputs side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined
