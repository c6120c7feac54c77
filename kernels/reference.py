"""Plain torch oracles: the same signatures as the kernels, written for reading."""

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels.head_norms import HeadNorms
from magicdec.kernels.paged_layout import PagedLayout

_MASK64 = 2**64 - 1


def paged_attention(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of every row over its sequence's pages, fp32 inside.

    The rows' own K/V are already in the pages. Returns [num_query_heads, num_rows, head_dim].
    """
    outputs, row = [], 0
    for i, (context_len, query_len) in enumerate(
        zip(layout.context_lens, layout.query_lens, strict=True)
    ):
        num_keys = context_len + query_len
        slots = torch.from_numpy(layout.slots(i, 0, num_keys)).to(k_cache.device)
        rows = query[:, row : row + query_len]
        mask = layout.causal_mask(query_len, num_keys, sliding_window or 0, 1, rows)
        k, v = k_cache.index_select(1, slots), v_cache.index_select(1, slots)
        outputs.append(masked_attention(rows, k, v, mask, scaling, softcap))
        row += query_len
    return torch.cat(outputs, dim=1)


def masked_attention(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    key: torch.Tensor,  # [num_kv_heads, num_keys, head_dim]
    value: torch.Tensor,
    mask: torch.Tensor,  # additive, broadcast to [num_query_heads, num_rows, num_keys]
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    group_size = query.shape[0] // max(key.shape[0], 1)
    key = key.repeat_interleave(group_size, dim=0).float()
    value = value.repeat_interleave(group_size, dim=0).float()
    scores = query.float() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + mask, dim=-1) @ value).to(query.dtype)


def gathered_attention(
    query: torch.Tensor,  # [num_query_heads, batch, head_dim]
    k_view: torch.Tensor,  # [num_kv_heads, batch, num_keys, head_dim]
    v_view: torch.Tensor,
    mask: torch.Tensor,  # additive, [batch, num_keys]
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One row a sequence over that sequence's gathered view. Returns like query."""
    outputs = [
        masked_attention(
            query[:, i : i + 1], k_view[:, i], v_view[:, i], mask[i].float(), scaling, softcap
        )
        for i in range(query.shape[1])
    ]
    return torch.cat(outputs, dim=1)


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """rows: [..., num_dims] (arXiv 1910.07467)."""
    scale = torch.rsqrt(rows.double().pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight.double() * rows.double() * scale).to(rows.dtype)


def add_rms_norm(
    rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm of the sum, and the sum."""
    summed = rows + residual
    return rms_norm(summed, weight, epsilon), summed


def rotate(
    rows: torch.Tensor,  # [num_rows, heads and more]
    cos: torch.Tensor,  # [num_rows, head_dim]
    sin: torch.Tensor,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first num_heads heads of every row, each turned
    by halves as transformers has it, after its norm where there are any."""
    num_rows, head_dim = cos.shape
    size = num_heads * head_dim
    heads = rows[:, :size].view(num_rows, num_heads, head_dim)
    if norms is not None:
        heads = rms_norm(heads, norms.weights, norms.epsilon)
    first, second = heads.chunk(2, dim=-1)
    turned = heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned.flatten(1), rows[:, size:]], dim=1)


def silu_product(rows: torch.Tensor) -> torch.Tensor:
    """rows: [..., 2 * num_dims], gates first. Returns silu(gates) times the rest."""
    gates, rest = rows.double().chunk(2, dim=-1)
    return (gates * torch.sigmoid(gates) * rest).to(rows.dtype)


def linear(
    rows: torch.Tensor,  # [..., num_inputs]
    weight: torch.Tensor,  # [num_outputs, num_inputs]
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,  # [..., num_outputs]
) -> torch.Tensor:
    """As torch's; added to the residual after it is rounded."""
    products = rows.double() @ weight.double().T
    if bias is not None:
        products += bias.double()
    output = products.to(rows.dtype)
    return output if residual is None else residual + output


def gated_linear(
    rows: torch.Tensor,  # [..., num_inputs]
    weight: torch.Tensor,  # [2 * num_dims, num_inputs]
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu_product of the linear."""
    return silu_product(linear(rows, weight, bias))


def random_words(
    seed: int, position: int, num_words: int, role: int = 0, step: int = 0
) -> NDArray[np.uint32]:
    """Philox4x64-10 in Python integers: the words that every backend must reproduce bit for bit."""
    words: list[int] = []
    block = 0
    while len(words) < num_words:
        block += 1
        for word in _philox4x64((block, position, role, step), (seed, 0)):
            words += [word & 0xFFFFFFFF, word >> 32]
    return np.array(words[:num_words], dtype=np.uint32)


def _philox4x64(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Salmon et al., SC 2011, ten rounds."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ k0,
            product1 & _MASK64,
            (product0 >> 64) ^ c3 ^ k1,
            product0 & _MASK64,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK64, (k1 + 0xBB67AE8584CAA73B) & _MASK64
    return c0, c1, c2, c3
