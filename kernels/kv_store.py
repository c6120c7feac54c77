"""Writing K/V rows into pages."""

from typing import Protocol

import torch


class StoreKv(Protocol):
    """See store_kv."""

    def __call__(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None: ...


def store_kv(
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    key: torch.Tensor,  # [num_kv_heads, num_rows, head_dim]
    value: torch.Tensor,
    slot_mapping: torch.Tensor,  # [num_rows]
) -> None:
    """Row i goes to slot_mapping[i]; what was there is lost. Rows may be wider than pages."""
    k_cache.index_copy_(1, slot_mapping, key.to(k_cache.dtype))
    v_cache.index_copy_(1, slot_mapping, value.to(v_cache.dtype))
