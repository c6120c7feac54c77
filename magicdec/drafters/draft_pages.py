"""The draft model's K/V of every position, in pages of its own under the target's block tables."""

from collections.abc import Sequence

import numpy as np

from magicdec.attention import PagedAttention
from magicdec.batch import ScheduledSequence
from magicdec.drafters.draft_model import Piece, Positions
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache


class DraftPages:
    """Keeps, a block, how many of its leading slots hold draft K/V of the tokens it holds now.

        block        |  7   |  2   |  9   |     block_table of a sequence
        positions    |::::::|::::::|::....|     :  computed by the target
        num_valid       8      8      1         draft K/V: the target's block 9 has moved on

    That a block was filled by another sequence makes no difference, so a prefix that is shared
    brings its draft K/V along where the other sequence drafted with this model. Every forward of
    the target that writes into a block takes back what it overwrites: a block that changes hands
    starts from nothing, because its first slot is written first.
    """

    def __init__(self, cache: PagedKVCache, backend: AttentionBackend, drafter: str) -> None:
        self._cache = cache
        self._backend = backend
        self._drafter = drafter  # the name that sequences know this one by
        self._num_valid = np.zeros(cache.num_blocks, dtype=np.int64)

    def missing(self, sequence: ScheduledSequence) -> list[Positions]:
        """See DraftCache.missing."""
        return [np.arange(self._num_fed(sequence), sequence.num_tokens)]

    def attention(self, pieces: list[Piece]) -> PagedAttention:
        """See DraftCache.attention."""
        layout = PagedLayout(
            query_lens=tuple(len(positions) for _, positions in pieces),
            context_lens=tuple(int(positions[0]) for _, positions in pieces),
            block_tables=tuple(sequence.block_table for sequence, _ in pieces),
            block_size=self._cache.block_size,
        )
        return PagedAttention(self._cache, layout, self._backend)

    def mark_fed(self, sequences: list[ScheduledSequence]) -> None:
        """See DraftCache.mark_fed."""
        size = self._cache.block_size
        for sequence in sequences:
            blocks = sequence.block_table[: -(-sequence.num_tokens // size)]
            self._num_valid[blocks] = size
            self._num_valid[blocks[-1]] = (sequence.num_tokens - 1) % size + 1

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> list[ScheduledSequence]:
        """See DraftCache.watch. Prompts are fed chunk by chunk, or the first round of a long one
        would wait for all of it."""
        prefilled = []
        for i, sequence in enumerate(sequences):
            first = sequence.num_computed_tokens
            own = sequence.draft is not None and sequence.draft.drafter == self._drafter
            if own and sequence.draft_length > 0:
                first = sequence.num_tokens  # its last token was fed before it was drafted for
            self._take_back(sequence, first, layout.context_lens[i] + layout.query_lens[i])
            if own and not sequence.is_decode_row:
                prefilled.append(sequence)
        return prefilled

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Nothing is kept by sequence."""

    def _num_fed(self, sequence: ScheduledSequence) -> int:
        """Leading tokens whose draft K/V are there.

        The counts of slots that the target has yet to compute are an earlier owner's.
        """
        size, num_computed = self._cache.block_size, sequence.num_computed_tokens
        num_valid = self._num_valid[sequence.block_table[: -(-num_computed // size)]]
        partial = np.flatnonzero(num_valid < size)
        fed = num_computed
        if len(partial) > 0:
            fed = int(partial[0]) * size + int(num_valid[partial[0]])
        return min(fed, num_computed)

    def _take_back(self, sequence: ScheduledSequence, first: int, stop: int) -> None:
        """Positions first..stop-1 are about to hold other tokens."""
        if first >= stop:
            return
        size = self._cache.block_size
        indices = np.arange(first // size, -(-stop // size))
        blocks = sequence.block_table[indices]
        kept = np.maximum(first - indices * size, 0)
        self._num_valid[blocks] = np.minimum(self._num_valid[blocks], kept)
