"""The target drafts for itself over a small part of its KV cache (MagicDec, arXiv 2408.11049)."""

import torch

from magicdec.batch import ScheduledSequence
from magicdec.drafters.base import Forward
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.sampler import Sampler, SamplerRow
from magicdec.sparse_kv import DraftAttention


class SelfDrafter:
    """Autoregressive draft steps of the same weights, one row a sequence."""

    def __init__(
        self,
        forward: Forward,
        cache: PagedKVCache,
        backend: AttentionBackend,
        sampler: Sampler,
        num_sink_tokens: int,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._backend = backend
        self._sampler = sampler
        self._num_sink_tokens = num_sink_tokens

    def propose(
        self, sequences: list[ScheduledSequence], draft_budget: int
    ) -> list[tuple[int, ...]]:
        """See Drafter.propose. Rows with a shorter draft run along and are cut."""
        draft_length = max(s.draft_length for s in sequences)
        layout = PagedLayout(
            query_lens=(1,) * len(sequences),
            context_lens=tuple(s.num_computed_tokens for s in sequences),
            block_tables=tuple(s.block_table for s in sequences),
            block_size=self._cache.block_size,
        )
        attention = DraftAttention(
            self._cache, layout, self._backend, draft_length, draft_budget, self._num_sink_tokens
        )
        drafts: list[tuple[int, ...]] = [() for _ in sequences]
        token_ids = torch.tensor([int(s.token_ids[0]) for s in sequences])
        last = torch.tensor([s.num_computed_tokens + s.draft_length for s in sequences])
        for step in range(draft_length):
            # A row whose own draft is done stays where its context still has positions.
            positions = torch.minimum(attention.begin_step(step), last)
            logits = self._forward(token_ids, positions, attention)
            rows = [SamplerRow.after(s, d) for s, d in zip(sequences, drafts, strict=True)]
            chosen = self._sampler.sample(logits, rows)
            drafts = [(*d, token) for d, token in zip(drafts, chosen, strict=True)]
            token_ids = torch.tensor(chosen)
        return [d[: s.draft_length] for d, s in zip(drafts, sequences, strict=True)]
