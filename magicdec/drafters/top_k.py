"""The upper bound of sparse drafting: each draft step reads exactly its best keys.

MagicDec's dynamic selection (arXiv 2408.11049, Eq. 3): every step scores all keys of every layer
and KV head, which costs more than it saves. For measuring other selections; never served.
"""

from collections.abc import Sequence

import torch

from magicdec.attention import AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.drafters.base import Forward, Propose
from magicdec.drafters.self_draft import draft_layout, draft_steps
from magicdec.kernels.heads import Heads
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.reference import masked_attention
from magicdec.kv_cache import PagedKVCache
from magicdec.sampler import Proposal


class TopKDrafter:
    """Keeps nothing between rounds."""

    def __init__(self, forward: Forward, propose: Propose, cache: PagedKVCache) -> None:
        self._forward = forward
        self._propose = propose
        self._cache = cache

    def propose(self, sequences: list[ScheduledSequence]) -> list[tuple[Proposal, ...]]:
        """See Drafter.propose."""
        attention = _TopKAttention(
            self._cache,
            draft_layout(sequences, self._cache.block_size),
            [s.draft.draft_budget - s.draft_length for s in sequences if s.draft is not None],
        )
        return draft_steps(sequences, attention, self._forward, self._propose)

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """See Drafter.watch."""
        return None

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See Drafter.release."""


class _TopKAttention:
    """The num_keys positions of the context with the greatest weight, and the round's own."""

    def __init__(self, cache: PagedKVCache, layout: PagedLayout, num_keys: list[int]) -> None:
        self._cache = cache
        self._layout = layout
        self._num_keys = num_keys
        self._own: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._step = -1

    def begin_step(self, step: int) -> torch.Tensor:
        """See DraftContext."""
        self._step = step
        return torch.tensor(self._layout.context_lens) + step

    def attend(
        self,
        layer: int,
        heads: Heads,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See AttentionContext."""
        query, key, value = heads.rotated()
        own = self._own.setdefault(layer, [])
        own.append((key, value))
        outputs = []
        for i, context_len in enumerate(self._layout.context_lens):
            first = 0
            if sliding_window is not None:
                first = max(context_len + self._step - sliding_window + 1, 0)
            slots = torch.from_numpy(self._layout.slots(i, first, context_len))
            slots = slots.to(key.device)
            k = self._cache.k[layer].index_select(1, slots).to(key.dtype)
            v = self._cache.v[layer].index_select(1, slots).to(key.dtype)
            row = query[:, i : i + 1]
            best = _best_keys(row, k, self._num_keys[i], scaling, softcap)
            index = best[:, :, None].expand(-1, -1, k.shape[2])
            k = torch.cat([k.gather(1, index), *(ok[:, i : i + 1] for ok, _ in own)], dim=1)
            v = torch.cat([v.gather(1, index), *(ov[:, i : i + 1] for _, ov in own)], dim=1)
            mask = torch.zeros(1, k.shape[1], device=key.device)
            outputs.append(masked_attention(row, k, v, mask, scaling, softcap))
        return torch.cat(outputs, dim=1)


def _best_keys(
    row: torch.Tensor,  # [num_query_heads, 1, head_dim]
    k: torch.Tensor,  # [num_kv_heads, num_keys, head_dim]
    count: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Indices [num_kv_heads, count] by the weight that the GQA group gives together."""
    num_kv_heads = k.shape[0]
    grouped = row.reshape(num_kv_heads, -1, row.shape[2]).float() * scaling
    scores = grouped @ k.float().transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores, dim=-1).sum(dim=1)
    return weights.topk(min(count, weights.shape[1]), dim=1).indices
