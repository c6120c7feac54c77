"""The draft's attention: one row a sequence over a gathered view of its pages."""

import torch

from magicdec.kernels import reference


def gather_view(
    cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    slots: torch.Tensor,  # [num_kv_heads, batch, num_keys], head * num_slots + slot
) -> torch.Tensor:
    """Copies the view once a round, each head's own; the draft steps then read it in place.

    Returns [num_kv_heads, batch, num_keys, head_dim].
    """
    num_kv_heads, num_slots, head_dim = cache.shape
    by_slot = cache.view(num_kv_heads * num_slots, head_dim)
    gathered = by_slot.index_select(0, slots.flatten())
    return gathered.view(*slots.shape, head_dim)


def gathered_attention(
    query: torch.Tensor,  # [num_query_heads, batch, head_dim]
    k_view: torch.Tensor,  # [num_kv_heads, batch, num_keys, head_dim]
    v_view: torch.Tensor,
    mask: torch.Tensor,  # additive, k_view.dtype, [batch, num_keys]
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See reference.gathered_attention. Soft-capped scores take the reference's path."""
    num_kv_heads, batch, _, head_dim = k_view.shape
    if softcap is not None or num_kv_heads == 0:
        return reference.gathered_attention(query, k_view, v_view, mask, scaling, softcap)
    group_size = query.shape[0] // num_kv_heads
    narrow = query.to(k_view.dtype)
    folded = narrow.reshape(num_kv_heads, group_size, batch, head_dim).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, k_view, v_view, attn_mask=mask[None, :, None], scale=scaling
    )  # [num_kv_heads, batch, group_size, head_dim]
    return out.transpose(1, 2).reshape(query.shape).to(query.dtype)
