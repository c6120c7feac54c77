"""Which keys attention weighs most: the scores and the choice behind `snapkv` and `recycled`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import avg_pool1d

from magicdec.kernels.paged_layout import PagedLayout


class AttentionMass(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        layout: PagedLayout,
        sequence: int,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class LayeredMass(Protocol):
    """An AttentionMass of layers alike in heads: fp32 [num_layers, num_kv_heads, num_keys]."""

    def __call__(
        self,
        queries: Sequence[torch.Tensor],  # a layer: [num_query_heads, num_rows, head_dim]
        k_caches: Sequence[torch.Tensor],
        layout: PagedLayout,
        sequence: int,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class LargestIndices(Protocol):
    def __call__(self, scores: torch.Tensor, count: int) -> torch.Tensor: ...


def largest_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Of each row of fp32 [num_rows, num_entries], largest first: int64 [num_rows, count].

    `count` is at most num_entries. Which of equal entries comes first is not said here; of kernels
    in C++ and Triton it is the one of lower position, zeros of both signs being equal.
    """
    return scores.topk(count, dim=1).indices


def attention_mass(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The attention that a sequence's last rows give to each of its keys, softmax in fp32.

    `query` holds the last num_rows of the sequence's rows; their own keys are in the pages. Summed
    over rows and over the GQA group. Returns fp32 [num_kv_heads, num_keys], where num_keys is
    context and rows together and every head's entries sum to group_size * num_rows.
    """
    num_kv_heads, num_rows = k_cache.shape[0], query.shape[1]
    num_keys = layout.context_lens[sequence] + layout.query_lens[sequence]
    if num_kv_heads == 0:
        return torch.zeros(0, num_keys, device=query.device)
    group_size = query.shape[0] // num_kv_heads
    folded = query.float().reshape(num_kv_heads, group_size * num_rows, -1) * scaling
    # The pages of a run lie together: its keys are widened, never gathered.
    pieces = [
        folded @ k_cache[:, start : start + length].float().transpose(1, 2)
        for start, length in layout.runs(sequence, num_keys)
    ]
    scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Only the keys of the rows themselves are hidden from some of them.
    own = scores.view(num_kv_heads, group_size, num_rows, num_keys)[..., num_keys - num_rows :]
    hidden = torch.ones(num_rows, num_rows, dtype=torch.bool, device=query.device).triu(1)
    own.masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1).sum(dim=1)


def layered_mass(
    queries: Sequence[torch.Tensor],  # a layer: [num_query_heads, num_rows, head_dim]
    k_caches: Sequence[torch.Tensor],
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    softcap: float | None = None,
    mass: AttentionMass = attention_mass,
) -> torch.Tensor:
    """One layer after the other: [num_layers, num_kv_heads, num_keys]."""
    layers = zip(queries, k_caches, strict=True)
    return torch.stack([mass(q, k, layout, sequence, scaling, softcap) for q, k in layers])


def rank_top(
    mass: torch.Tensor,  # fp32 [num_layers, num_kv_heads, num_keys]
    first: int,
    stop: int,
    count: int,
    pool_size: int = 1,
    chunk_size: int = 1,
    coverage: float = 1.0,
    largest: LargestIndices = largest_indices,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The positions in first..stop-1 that hold most of the mass, a KV head, best first; and how
    many of them each layer needs, None for all.

    The mass is averaged over pool_size neighbours (odd, same length; SnapKV, arXiv 2404.14469).
    chunk_size positions, aligned to `first`, are chosen together; one cut short by `stop` never is,
    being beside the recent positions that are read anyway. With coverage below 1, a layer needs no
    more than its neediest head does to hold that share of all its mass together with the keys
    outside first..stop-1, which are always read.
    Returns int64 [num_layers, num_kv_heads, at most count] and int64 [num_layers]; the host waits
    for neither.
    """
    num_layers, num_kv_heads, _ = mass.shape
    rows = mass.flatten(0, 1)
    candidates = rows[:, first:stop]
    count = min(count, candidates.shape[1])
    if count <= 0 or len(rows) == 0:
        return mass.new_zeros(num_layers, num_kv_heads, 0, dtype=torch.long), None
    if pool_size > 1:
        pooled = avg_pool1d(rows[:, None], pool_size, stride=1, padding=pool_size // 2)
        candidates = pooled[:, 0, first:stop]
    chosen = _best_chunks(candidates, count, chunk_size, largest)
    positions = (chosen + first).view(num_layers, num_kv_heads, -1)
    if coverage >= 1.0:
        return positions, None
    inside = rows[:, first:stop]
    held = inside.gather(1, chosen).cumsum(dim=1)
    wanted = coverage * rows.sum(dim=1) - (rows.sum(dim=1) - inside.sum(dim=1))
    steps = (held < wanted[:, None]).sum(dim=1).view(num_layers, num_kv_heads)
    return positions, (steps.amax(dim=1) + 1).clamp(max=chosen.shape[1])


def _best_chunks(
    candidates: torch.Tensor, count: int, chunk_size: int, largest: LargestIndices
) -> torch.Tensor:
    if chunk_size == 1:
        return largest(candidates, count)
    num_kv_heads, num_candidates = candidates.shape
    num_chunks = num_candidates // chunk_size
    whole = candidates[:, : num_chunks * chunk_size].reshape(num_kv_heads, num_chunks, chunk_size)
    best = largest(whole.sum(dim=2), min(count // chunk_size, num_chunks))
    offsets = torch.arange(chunk_size, device=candidates.device)
    return (best[:, :, None] * chunk_size + offsets).flatten(1)
