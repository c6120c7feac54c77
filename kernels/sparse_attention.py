"""The draft's attention: one row a sequence over a view of its pages and the round's own tokens."""

from typing import Protocol

import torch

from magicdec.kernels import reference


class DraftView(Protocol):
    """One layer's K/V of a round's draft steps: listed slots of the pages, then a column a step.

    column    0 ................ num_listed-1 | num_listed .. num_listed+num_own-1
    holds     slots of the pages              | the rows that the steps append
    """

    def attend(
        self,
        query: torch.Tensor,  # [num_query_heads, batch, head_dim]
        key: torch.Tensor,  # [num_kv_heads, batch, head_dim]
        value: torch.Tensor,
        step: int,  # the rows' own column
        mask: torch.Tensor,  # additive, the pages' dtype, [batch, num_columns]
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Appends K/V and returns the rows' attention, shaped like query."""
        ...


class MakeView(Protocol):
    def __call__(
        self,
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        v_cache: torch.Tensor,
        slots: torch.Tensor,  # [num_kv_heads, batch, num_listed], head * num_slots + slot
        num_own: int,
    ) -> DraftView: ...


class DeviceView(Protocol):
    """A DraftView whose step is known on the device alone: its attention may be part of a graph."""

    @property
    def static(self) -> list[torch.Tensor]:
        """What it holds beside pages and slots."""
        ...

    def attend_at(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: torch.Tensor,  # int32 [1]; columns after the step's are hidden, whatever the mask
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class MakeDeviceView(Protocol):
    """The slots are read when the view attends."""

    def __call__(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, num_own: int
    ) -> DeviceView: ...


class GatheredAttention(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class CopiedView:
    """Copied once a round, each head's own; the draft steps then read it in place."""

    def __init__(
        self,
        attend: GatheredAttention,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        num_own: int,
    ) -> None:
        padded = torch.nn.functional.pad(slots, (0, num_own))
        self._attend = attend
        self._keys, self._values = gather_view(k_cache, padded), gather_view(v_cache, padded)
        self._num_listed = slots.shape[2]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: int,
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See DraftView."""
        self._keys[:, :, self._num_listed + step] = key
        self._values[:, :, self._num_listed + step] = value
        return self._attend(query, self._keys, self._values, mask, scaling, softcap)


def gather_view(
    cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    slots: torch.Tensor,  # [num_kv_heads, batch, num_keys], head * num_slots + slot
) -> torch.Tensor:
    """Returns [num_kv_heads, batch, num_keys, head_dim]."""
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
