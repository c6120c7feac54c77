"""Paged attention on CPUs through torch's flash kernel: contiguous runs of pages without a copy.

The prefix that every row sees is read in place, each run of consecutive blocks cut into equal
splits so that one long sequence keeps every core busy; the rest (leftovers of the cuts, and the
causal tail of the rows themselves) is a small masked call. Partial results merge by log-sum-exp
(flash-decoding). The GQA group is folded into the rows: a KV head is read once for its group.
"""

import torch

from magicdec.kernels import reference
from magicdec.kernels.paged_layout import PagedLayout

_SPLIT_KEYS = 1024  # a split shorter than this costs more to launch than it balances
_MAX_SPLITS = 8
_MIN_RUN = 256  # shorter runs are copied into the tail instead of being read in place
_MAX_FOLDED_ROWS = 32  # rows that a decode or verify pass may have; above, it is prefill


def paged_attention(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See reference.paged_attention. Soft-capped scores take the reference's path."""
    if softcap is not None or k_cache.shape[0] == 0:
        return reference.paged_attention(
            query, k_cache, v_cache, layout, scaling, sliding_window, softcap
        )
    output = torch.empty_like(query)
    attend_chunks(query, k_cache, v_cache, layout, scaling, sliding_window, 0, output)
    return output


def attend_chunks(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scaling: float,
    sliding_window: int | None,
    least_rows: int,
    output: torch.Tensor,
) -> None:
    """Fills the output's rows of those sequences that have more than `least_rows`."""
    row = 0
    for i, query_len in enumerate(layout.query_lens):
        stop = row + query_len
        if query_len > least_rows:
            rows = query[:, row:stop].to(k_cache.dtype)
            num_keys = layout.context_lens[i] + query_len
            if sliding_window is not None and num_keys > sliding_window:
                part = _windowed(rows, k_cache, v_cache, layout, i, scaling, sliding_window)
            else:
                part = _full(rows, k_cache, v_cache, layout, i, scaling)
            output[:, row:stop] = part
        row = stop


def _full(
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    sequence: int,
    scaling: float,
) -> torch.Tensor:
    num_kv_heads, query_len = k_cache.shape[0], rows.shape[1]
    group_size = rows.shape[0] // num_kv_heads
    context_len = layout.context_lens[sequence]
    folded = rows.reshape(num_kv_heads, 1, group_size * query_len, -1)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    tail: list[torch.Tensor] = []
    # With one row the causal tail is the row itself: every key is prefix.
    prefix_len = context_len + (1 if query_len == 1 else 0)
    for start, length in layout.runs(sequence, prefix_len):
        if length < _MIN_RUN:
            tail.append(torch.arange(start, start + length))
            continue
        splits = min(max(length // _SPLIT_KEYS, 1), _MAX_SPLITS)
        if query_len > _MAX_FOLDED_ROWS:
            splits = 1  # the rows alone fill the cores
        size = length // splits
        shape = (num_kv_heads, splits, size, k_cache.shape[2])
        k = k_cache[:, start : start + splits * size].view(shape)
        v = v_cache[:, start : start + splits * size].view(shape)
        parts.append(_flash(folded.expand(-1, splits, -1, -1), k, v, None, scaling))
        tail.append(torch.arange(start + splits * size, start + length))
    if prefix_len == context_len:
        own = layout.slots(sequence, context_len, context_len + query_len)
        tail.append(torch.from_numpy(own))
    slots = torch.cat(tail) if tail else torch.empty(0, dtype=torch.long)
    if len(slots) > 0:
        mask = layout.causal_mask(query_len, len(slots), 0, group_size, rows)
        parts.append(_copied(folded, k_cache, v_cache, slots, mask, scaling))
    return _merge(parts).reshape(rows.shape)


def _windowed(
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """The window bounds the keys, so they are copied and masked in one call."""
    num_kv_heads, query_len = k_cache.shape[0], rows.shape[1]
    group_size = rows.shape[0] // num_kv_heads
    context_len = layout.context_lens[sequence]
    first = max(context_len - window + 1, 0)
    slots = torch.from_numpy(layout.slots(sequence, first, context_len + query_len))
    mask = layout.causal_mask(query_len, len(slots), window, group_size, rows)
    folded = rows.reshape(num_kv_heads, 1, group_size * query_len, -1)
    out, _ = _copied(folded, k_cache, v_cache, slots, mask, scaling)
    return out.reshape(rows.shape)


def _copied(
    folded: torch.Tensor,  # [num_kv_heads, 1, folded_rows, head_dim]
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,  # [num_keys], ending with the rows' own
    mask: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that do not lie together, copied and masked."""
    k, v = k_cache.index_select(1, slots)[:, None], v_cache.index_select(1, slots)[:, None]
    return _flash(folded, k, v, mask, scaling)


def _flash(
    query: torch.Tensor,  # [num_kv_heads, splits, folded_rows, head_dim]
    key: torch.Tensor,  # [num_kv_heads, splits, num_keys, head_dim]
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and fp32 log-sum-exp [num_kv_heads, splits, folded_rows]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scaling
    )
    return out, lse


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Weighs partial outputs by their share of the softmax mass, fp32."""
    out = torch.cat([part for part, _ in parts], dim=1)
    if out.shape[1] == 1:
        return out
    weights = torch.softmax(torch.cat([lse for _, lse in parts], dim=1), dim=1).unsqueeze(-1)
    return (out * weights).sum(dim=1).to(out.dtype)
