"""The next step's forward, launched before the host has this one's tokens.

    device   | forward n | choose n | forward n+1 ................. | choose n+1 | forward n+2 ...
    host       launch n+1, wait for n | emit, schedule, find n+1's rows | launch n+2, wait ...

Plain decode rows go on by a token each, which is on the device. What is asked for then is found row
by row: a sequence's tokens are what was chosen for it, so the same stay at the next position is the
same row. Who has ended is left out. Where a row was not foreseen all run again, and write the same
K/V over what is there, or a block's new owner his own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from magicdec.attention import AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.drafts import Draft
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.transfer import send


@dataclass(frozen=True, slots=True)
class NextStep:
    """A forward that runs, or has run, over one row of each of some sequences."""

    rows: dict[tuple[int, int], int]  # by sequence_id and the row's position
    logits: torch.Tensor  # [num_rows, vocab_size]
    graphs: ForwardGraphs

    @classmethod
    def launch(
        cls,
        graphs: ForwardGraphs,
        sequences: Sequence[ScheduledSequence],  # whose last tokens a step has computed
        chosen: torch.Tensor,  # int64 [num_sequences] on the device: what follows on each
        block_size: int,
    ) -> "NextStep":
        positions = [s.num_tokens for s in sequences]
        layout = PagedLayout(
            query_lens=(1,) * len(sequences),
            context_lens=tuple(positions),
            block_tables=tuple([s.block_table for s in sequences]),
            block_size=block_size,
        )
        rows = torch.arange(len(sequences))
        logits = graphs.forward(layout, -1 - rows, rows, drafted=chosen)
        keys = zip([s.sequence_id for s in sequences], positions, strict=True)
        return cls({key: row for row, key in enumerate(keys)}, logits, graphs)

    def rows_of(
        self, sequences: Sequence[ScheduledSequence], drafts: Sequence[Draft]
    ) -> list[int] | None:
        """Which rows a step's are; None: not all of them are here."""
        found = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            row = self.rows.get((sequence.sequence_id, sequence.num_computed_tokens))
            if row is None or len(sequence.token_ids) != 1 or len(draft) > 0:
                return None
            found.append(row)
        return found

    def take(self, rows: Sequence[int], observers: Sequence[AttentionObserver]) -> torch.Tensor:
        """Logits of these rows, whose attention the observers see. No graph may have been replayed
        since."""
        self.graphs.show(observers, rows)
        if list(rows) == list(range(len(self.logits))):
            return self.logits
        kept = torch.from_numpy(np.array(rows, dtype=np.int64))
        return self.logits.index_select(0, send(kept, self.logits.device))
