"""A layer's query, key and value, as whoever attends asks for them."""

from typing import NamedTuple, Protocol

import torch

from magicdec.kernels.kv_store import StoreKv


class Heads(Protocol):
    """Of a forward's rows. They may be rotated where they lie, so only one of the two is asked for,
    and once."""

    def rotated(self) -> "RotatedHeads":
        """Where key and value go elsewhere than to pages."""
        ...

    def stored(
        self,
        store: StoreKv,  # serves where no kernel rotates and stores
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,  # [num_rows]
    ) -> torch.Tensor:
        """The rotated query, [num_query_heads, num_rows, head_dim]; the rest is in the pages
        then, as `store` puts it there."""
        ...


class RotatedHeads(NamedTuple):
    """Heads that are what they are to be."""

    query: torch.Tensor  # [num_query_heads, num_rows, head_dim]
    key: torch.Tensor  # [num_kv_heads, num_rows, head_dim]
    value: torch.Tensor

    def rotated(self) -> "RotatedHeads":
        """See Heads."""
        return self

    def stored(
        self,
        store: StoreKv,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See Heads."""
        store(k_cache, v_cache, self.key, self.value, slot_mapping)
        return self.query
