"""Decoder layers of packed linears, compiled but for their attention: two calls in place of eight.

Nothing is computed otherwise, but a step of few rows spent a third of its time between calls.
"""

import ctypes
import logging

import torch
from torch import nn

from magicdec.attention import AttentionContext
from magicdec.fused_layers import FusedAttention, FusedDecoderLayer, FusedMlp, FusedRmsNorm
from magicdec.kernels.cpu_layer import CpuLayer, LayerParts, Norm
from magicdec.kernels.cpu_linear import PackedLinear

logger = logging.getLogger(__name__)


class CompiledDecoderLayer(nn.Module):
    """A FusedDecoderLayer, whose modules it keeps."""

    def __init__(self, layer: FusedDecoderLayer, parts: LayerParts, library: ctypes.CDLL) -> None:
        super().__init__()
        self.layer = layer
        if "attention_type" in vars(layer):  # which of the model's masks it is given
            self.attention_type = layer.attention_type
        self._attention: FusedAttention = layer.self_attn
        self._kernel = CpuLayer(library, parts)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [1, num_rows, hidden_size]
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # [1, num_rows, head_dim] each
        attention_context: AttentionContext,
        **ignored: object,
    ) -> torch.Tensor:
        rows = hidden_states[0].contiguous()
        cos, sin = (turns[0].contiguous() for turns in position_embeddings)
        attention = self._attention
        heads = attention.split(self._kernel.start(rows, cos, sin).transpose(0, 1))
        output = attention.attend(heads, attention_context)
        return self._kernel.end(output.contiguous(), rows)[None]


def compile_layers(module: nn.Module, library: ctypes.CDLL) -> None:
    """Replaces every FusedDecoderLayer below the module whose linears are all packed."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not FusedDecoderLayer:
                continue
            parts = _parts(child)
            if parts is not None:
                setattr(parent, name, CompiledDecoderLayer(child, parts, library))
                count += 1
    logger.info("%d layers compiled but for their attention", count)


def _parts(layer: FusedDecoderLayer) -> LayerParts | None:
    """None: a part is of another kind."""
    attention: FusedAttention = layer.self_attn
    mlp, norm, after = layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    if not (isinstance(mlp, FusedMlp) and isinstance(norm, FusedRmsNorm)):
        return None
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(packed) < len(linears):
        return None
    qkv, attended, gate_up, down = packed
    return LayerParts(
        input_norm=Norm(norm.weight, norm.epsilon),
        attention_norm=Norm(after.weight, after.epsilon),
        qkv=qkv,
        attended=attended,
        gate_up=gate_up,
        down=down,
        num_heads=attention.num_heads + 2 * attention.num_kv_heads,
        num_turned=attention.num_heads + attention.num_kv_heads,
        head_dim=attention.head_dim,
        head_norms=attention.head_norms,
    )
