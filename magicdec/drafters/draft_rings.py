"""The draft model's K/V of the sink and the most recent positions, in a ring a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.attention import PagedAttention
from magicdec.batch import ScheduledSequence
from magicdec.config import MAX_DRAFT_LENGTH, SelectionConfig
from magicdec.drafters.draft_model import Piece, Positions
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.heads import Heads
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.sparse_kv import select_streaming


@dataclass(frozen=True, slots=True)
class RingShape:
    """Where a position lies in its sequence's ring.

        slot    0 ...... num_sink_tokens-1 | num_sink_tokens ............... num_slots-1
        holds   the first positions, kept  | position p at p mod the ring's length

    The ring is longer than the window by what a round may draft, so that rejected drafts never
    overwrite a remembered position.
    """

    window: int  # positions that a draft step sees, its round's own included
    num_sink_tokens: int

    @property
    def num_slots(self) -> int:
        return self.num_sink_tokens + self._length

    @property
    def _length(self) -> int:
        return self.window + MAX_DRAFT_LENGTH + 1

    def slots(self, ring: int, positions: Positions) -> NDArray[np.int64]:
        sink = self.num_sink_tokens
        in_ring = sink + (positions - sink) % self._length
        return np.asarray(ring * self.num_slots + np.where(positions < sink, positions, in_ring))


@dataclass(slots=True)
class _Ring:
    """One sequence's share: it remembers the sink and first_recent .. num_fed - 1."""

    index: int
    first_recent: int
    num_fed: int = 0


class DraftRings:
    """A ring for every sequence that may run. A step sees what the `streaming` self-drafter sees
    with the window as its draft_budget: sink, most recent positions, and its round's own tokens.

    A sequence without a ring, or whose ring is too far behind (after a prefix hit, a preemption, or
    rounds without this drafter), is refilled by one prefill of the window.
    """

    def __init__(
        self,
        cache: PagedKVCache,  # block_size 1: a block table is then a list of slots
        shape: RingShape,
        backend: AttentionBackend,
        config: SelectionConfig,
    ) -> None:
        self._cache = cache
        self._shape = shape
        self._backend = backend
        self._least_keys = config.num_sink_tokens + config.num_recent_tokens
        num_rings = cache.num_blocks // shape.num_slots
        self._free = list(range(num_rings - 1, -1, -1))
        self._rings: dict[int, _Ring] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def missing(self, sequence: ScheduledSequence) -> list[Positions]:
        """See DraftCache.missing."""
        ring = self._ring(sequence)
        last, num_sink = sequence.num_tokens - 1, self._shape.num_sink_tokens
        num_keys = self._num_keys(sequence)
        if last <= num_keys or ring.num_fed > last - (num_keys - num_sink):
            return [np.arange(ring.num_fed, last + 1)]
        # Window positions more than a step sees: a sliding-window layer has no sink, and spends
        # its share on them (select_streaming).
        ring.first_recent = max(last - self._shape.window, num_sink)
        recent = np.arange(ring.first_recent, last)
        return [np.concatenate([np.arange(num_sink), recent]), np.array([last])]

    def attention(self, pieces: list[Piece]) -> "RingAttention":
        """See DraftCache.attention."""
        return RingAttention(self, pieces)

    def mark_fed(self, sequences: list[ScheduledSequence]) -> None:
        """See DraftCache.mark_fed."""
        for sequence in sequences:
            self._rings[sequence.sequence_id].num_fed = sequence.num_tokens

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> list[ScheduledSequence]:
        """Nothing is fed before the first round: most of a prompt would be forgotten again."""
        return []

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See DraftCache.release."""
        for sequence_id in sequence_ids:
            ring = self._rings.pop(sequence_id, None)
            if ring is not None:
                self._free.append(ring.index)

    def layer_attention(self, pieces: list[Piece], sliding_window: int | None) -> PagedAttention:
        """Pages in the order in which a layer with this window sees them, the rows last."""
        views = [self._visible(sequence, rows, sliding_window) for sequence, rows in pieces]
        layout = PagedLayout(
            query_lens=tuple(len(rows) for _, rows in pieces),
            context_lens=tuple(len(view) for view in views),
            block_tables=tuple(
                self._shape.slots(
                    self._rings[sequence.sequence_id].index, np.concatenate([view, rows])
                )
                for view, (sequence, rows) in zip(views, pieces, strict=True)
            ),
            block_size=1,
        )
        return PagedAttention(self._cache, layout, self._backend)

    def _visible(
        self, sequence: ScheduledSequence, rows: Positions, sliding_window: int | None
    ) -> Positions:
        """Remembered positions before the rows that they see, ascending.

        The selection is made once a round, at the sequence's last token; later steps see it and
        the round's own tokens. Rows of a refill before that token see all that is remembered.
        """
        ring, last = self._rings[sequence.sequence_id], sequence.num_tokens - 1
        num_sink, num_keys = self._shape.num_sink_tokens, self._num_keys(sequence)
        if rows[-1] < last:
            num_keys = num_sink + self._shape.window
        first = last
        if sliding_window is not None and sliding_window <= num_keys:
            # The layer's window is the tighter bound, and starts earlier for the earlier rows.
            first = min(last, int(rows[0]))
        each = np.array([first]), np.array([num_keys])
        (selected,), _ = select_streaming(*each, num_sink, sliding_window)
        positions = np.concatenate([selected, np.arange(first, int(rows[0]))])
        seen = (positions < num_sink) | (positions >= ring.first_recent)
        seen &= positions < rows[0]
        if sliding_window is not None:
            seen &= positions > rows[0] - sliding_window
        return positions[seen]

    def _num_keys(self, sequence: ScheduledSequence) -> int:
        """Positions selected before the round, of the window that its own tokens share."""
        return max(self._shape.window - sequence.draft_length, self._least_keys)

    def _ring(self, sequence: ScheduledSequence) -> _Ring:
        if sequence.sequence_id not in self._rings:
            ring = _Ring(self._free.pop(), self._shape.num_sink_tokens)
            self._rings[sequence.sequence_id] = ring
        return self._rings[sequence.sequence_id]


class RingAttention:
    """The attention context of one forward over rings: layers alike in their window share pages
    laid out for it."""

    def __init__(self, rings: DraftRings, pieces: list[Piece]) -> None:
        self._rings = rings
        self._pieces = pieces
        self._by_window: dict[int | None, PagedAttention] = {}

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
        if sliding_window not in self._by_window:
            self._by_window[sliding_window] = self._rings.layer_attention(
                self._pieces, sliding_window
            )
        return self._by_window[sliding_window].attend(
            layer,
            heads,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        )
