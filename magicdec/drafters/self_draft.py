"""The target drafts for itself over a small part of its KV cache (MagicDec, arXiv 2408.11049)."""

from collections.abc import Sequence

import torch

from magicdec.attention import AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.config import SelectionConfig
from magicdec.drafters.base import Forward, Propose
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.sampler import Proposal, SamplerRow
from magicdec.sparse_kv import DraftAttention


class SelfDrafter:
    """Autoregressive draft steps of the same weights, one row a sequence."""

    def __init__(
        self,
        forward: Forward,
        propose: Propose,
        cache: PagedKVCache,
        backend: AttentionBackend,
        selection: SelectionConfig,
    ) -> None:
        self._forward = forward
        self._propose = propose
        self._cache = cache
        self._backend = backend
        self._selection = selection

    def propose(self, sequences: list[ScheduledSequence]) -> list[tuple[Proposal, ...]]:
        """See Drafter.propose. Rows with a shorter draft run along and are cut."""
        draft_length = max(s.draft_length for s in sequences)
        layout = PagedLayout(
            query_lens=(1,) * len(sequences),
            context_lens=tuple(s.num_computed_tokens for s in sequences),
            block_tables=tuple(s.block_table for s in sequences),
            block_size=self._cache.block_size,
        )
        attention = DraftAttention(
            self._cache,
            layout,
            self._backend,
            draft_length,
            max(s.draft.draft_budget for s in sequences if s.draft is not None),
            self._selection.num_sink_tokens,
        )
        drafts: list[tuple[Proposal, ...]] = [() for _ in sequences]
        token_ids = torch.tensor([int(s.token_ids[0]) for s in sequences])
        last = torch.tensor([s.num_computed_tokens + s.draft_length for s in sequences])
        for step in range(draft_length):
            # A row whose own draft is done stays where its context still has positions.
            positions = torch.minimum(attention.begin_step(step), last)
            logits = self._forward(token_ids, positions, attention)
            rows = [
                SamplerRow.after(s, tuple(p.token_id for p in d))
                for s, d in zip(sequences, drafts, strict=True)
            ]
            chosen = self._propose(logits, rows)
            drafts = [(*d, proposal) for d, proposal in zip(drafts, chosen, strict=True)]
            token_ids = torch.tensor([proposal.token_id for proposal in chosen])
        return [d[: s.draft_length] for d, s in zip(drafts, sequences, strict=True)]

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """See Drafter.watch."""
        return None

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See Drafter.release."""
