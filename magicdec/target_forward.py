"""The target's forward over a step's rows, replayed where graphs hold them.

    replayed   sequences of few rows: decode rows and their drafts, a prompt's last few tokens
    launched   longer chunks of prompts, in a forward of their own; without graphs, everything

The two know nothing of each other: no sequence reads what another one writes in the same step. A
block is shared from the step after the one that computed it on, and never written again
(prefix_cache.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.attention import AttentionObserver, PagedAttention, row_positions
from magicdec.batch import ScheduledSequence
from magicdec.drafts import Draft, references_of, token_ids_of, tokens_on_device
from magicdec.graphs.capture import KeptForward
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.graphs.forward_inputs import MOST_ROWS
from magicdec.graphs.next_step import NextStep
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.transfer import send
from magicdec.kv_cache import PagedKVCache
from magicdec.sampler import SamplerRow

TokenIds = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Some sequences' rows back to back: each one's tokens, then its draft."""

    sequences: tuple[ScheduledSequence, ...]
    drafts: tuple[Draft, ...]  # a sequence
    layout: PagedLayout

    @classmethod
    def of(
        cls, sequences: Sequence[ScheduledSequence], drafts: Sequence[Draft], block_size: int
    ) -> "StepRows":
        pairs = zip(sequences, drafts, strict=True)
        layout = PagedLayout(
            query_lens=tuple(len(s.token_ids) + len(d) for s, d in pairs),
            context_lens=tuple(s.num_computed_tokens for s in sequences),
            block_tables=tuple(s.block_table for s in sequences),
            block_size=block_size,
        )
        return cls(tuple(sequences), tuple(drafts), layout)

    def of_these(self, indices: Sequence[int]) -> "StepRows":
        sequences = [self.sequences[i] for i in indices]
        drafts = [self.drafts[i] for i in indices]
        return StepRows.of(sequences, drafts, self.layout.block_size)

    def token_ids(self, ids_of: Callable[[Draft], TokenIds] = token_ids_of) -> torch.Tensor:
        """[num_rows]; the host waits for drafts that are on the device, unless references_of them
        are enough."""
        pieces: list[TokenIds] = []
        for sequence, draft in zip(self.sequences, self.drafts, strict=True):
            pieces.append(sequence.token_ids)
            if len(draft) > 0:
                pieces.append(ids_of(draft))
        return torch.from_numpy(np.concatenate(pieces))

    def sampled(self) -> list[int]:
        """Which sequences choose tokens: all but chunks that end before the last one."""
        return [i for i, s in enumerate(self.sequences) if s.sampling is not None]

    def choices(self) -> list[SamplerRow]:
        """What the sampled sequences choose: after their tokens, and after each drafted one."""
        rows: list[SamplerRow] = []
        for i in self.sampled():
            sequence, draft = self.sequences[i], self.drafts[i]
            rows += SamplerRow.each_after(sequence, len(draft), partial(token_ids_of, draft))
        return rows

    def keep(self) -> torch.Tensor:
        """The rows whose logits these are chosen from, [num_choices]."""
        sampled = self.sampled()
        counts = np.array([len(self.drafts[i]) + 1 for i in sampled], dtype=np.int64)
        stops = np.cumsum(self.layout.query_lens, dtype=np.int64)[sampled]
        return torch.from_numpy(spans(stops - counts, counts))


def spans(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start .. start + count - 1 of each, end to end."""
    return np.repeat(starts + counts - np.cumsum(counts), counts) + np.arange(counts.sum())


class TargetForward:
    """Of one model and its pages."""

    def __init__(
        self,
        forward: KeptForward,
        cache: PagedKVCache,
        backend: AttentionBackend,
        graphs: ForwardGraphs | None,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._backend = backend
        self._graphs = graphs
        self._next: NextStep | None = None  # launched while the host waited for the step before

    def begin_next(self, step: StepRows, chosen: torch.Tensor) -> None:
        """Launches the step after this one of plain decode rows, whose choices the device has."""
        graphs, size = self._graphs, step.layout.block_size
        if graphs is not None:
            self._next = NextStep.launch(graphs, step.sequences, chosen, size)

    def __call__(self, step: StepRows, observers: Sequence[AttentionObserver]) -> torch.Tensor:
        """Logits of step.choices(), [num_choices, vocab_size]; the rows' K/V are in the pages then,
        and the observers have seen their sequences' attention."""
        query_lens = step.layout.query_lens
        begun, self._next = self._next, None
        if self._graphs is None or min(query_lens) > MOST_ROWS:
            return self._launched(step, observers)
        if max(query_lens) <= MOST_ROWS:
            return self._replayed(step, observers, self._graphs, begun)
        is_short = np.array(query_lens) <= MOST_ROWS
        parts = [np.flatnonzero(~is_short).tolist(), np.flatnonzero(is_short).tolist()]
        chunks, others = (step.of_these(part) for part in parts)
        # In this order the chunks are launched while the replay still runs.
        logits = [
            self._replayed(others, _over(observers, parts[1], others), self._graphs, begun),
            self._launched(chunks, _over(observers, parts[0], chunks)),
        ]
        order = [parts[1][i] for i in others.sampled()] + [parts[0][i] for i in chunks.sampled()]
        return _in_order(torch.cat(logits), order, step)

    def _launched(self, step: StepRows, observers: Sequence[AttentionObserver]) -> torch.Tensor:
        attention = PagedAttention(self._cache, step.layout, self._backend, observers)
        positions = row_positions(step.layout)
        logits = self._forward(step.token_ids(), positions, attention, step.keep())
        for observer in observers:
            observer.finish()
        return logits

    def _replayed(
        self,
        step: StepRows,
        observers: Sequence[AttentionObserver],
        graphs: ForwardGraphs,
        begun: NextStep | None,
    ) -> torch.Tensor:
        rows = None if begun is None else begun.rows_of(step.sequences, step.drafts)
        if begun is not None and rows is not None:
            return begun.take(rows, observers)
        token_ids, drafted = step.token_ids(references_of), tokens_on_device(step.drafts)
        return graphs.forward(step.layout, token_ids, step.keep(), observers, drafted)


def _over(
    observers: Sequence[AttentionObserver], part: Sequence[int], step: StepRows
) -> list[AttentionObserver]:
    """Those that look at a sequence of the part."""
    found = [observer.over(part, step.layout) for observer in observers]
    return [observer for observer in found if observer.num_sequences > 0]


def _in_order(logits: torch.Tensor, order: list[int], step: StepRows) -> torch.Tensor:
    """Rows of the sequences `order`, as the step has them."""
    counts = np.array([len(step.drafts[i]) + 1 for i in order], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    rows = [np.arange(starts[i], starts[i] + counts[i]) for i in np.argsort(order)]
    places = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *rows]))
    return logits.index_select(0, send(places, logits.device))
