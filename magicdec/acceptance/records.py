"""What goes into and comes out of the acceptance model: frozen data, and whether it can be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from magicdec.acceptance.prior import NUM_CONTEXT_BUCKETS, AcceptanceAxes, Floats
from magicdec.config import MAX_DRAFT_LENGTH

_LONGEST_CONTEXT = 1 << 32
_MOST_EXAMINED = 1e9  # of one cell, all replicas together
_LEAST_COUNT = 1e-3  # what is seen less is left out of a snapshot


class Observation(NamedTuple):
    """One decode row's round.

    `draft_length` is what the drafter was asked for, where that is known: one that proposed less
    failed at the next position. A row that was asked for nothing decoded plainly.
    """

    drafter: str
    draft_budget: float
    context_len: int
    num_draft_tokens: int
    num_accepted_tokens: int
    request_key: str | None = None
    draft_length: int | None = None

    @property
    def num_asked(self) -> int:
        return self.num_draft_tokens if self.draft_length is None else self.draft_length

    @property
    def num_examined(self) -> int:
        """Positions that were judged: up to the first that was not accepted."""
        return min(self.num_accepted_tokens + 1, self.num_asked)

    def is_possible(self, axes: AcceptanceAxes) -> bool:
        """Whether such a row can be. NaN fails every comparison."""
        context_len, drafted = self.context_len, self.num_draft_tokens
        accepted, asked = self.num_accepted_tokens, self.num_asked
        return (
            self.drafter in axes.drafters
            and 0 < self.draft_budget < math.inf
            and 1 <= context_len <= _LONGEST_CONTEXT
            and 0 <= accepted <= drafted <= asked <= MAX_DRAFT_LENGTH
            and context_len == int(context_len)
            and (accepted, drafted, asked) == (int(accepted), int(drafted), int(asked))
        )


def judged(rows: Sequence[Observation], num_positions: int) -> tuple[Floats, Floats]:
    """Which positions were examined and which accepted, 1 or 0: both [num_rows, num_positions]."""
    positions = np.arange(num_positions)
    examined = positions < np.array([[row.num_examined] for row in rows])
    accepted = positions < np.array([[row.num_accepted_tokens] for row in rows])
    return examined.astype(np.float64), accepted.astype(np.float64)


@dataclass(frozen=True, slots=True)
class CellCount:
    """Decayed counts of one cell; `position` is 1 for a round's first draft."""

    drafter: str
    draft_budget: float
    context_bucket: int
    position: int
    examined: float
    accepted: float

    def is_possible(self) -> bool:
        """Whether such counts can be. NaN fails every comparison."""
        return (
            0 <= self.accepted <= self.examined <= _MOST_EXAMINED
            and isinstance(self.context_bucket, int)
            and isinstance(self.position, int)
            and self.context_bucket in range(NUM_CONTEXT_BUCKETS)
            and self.position in range(1, MAX_DRAFT_LENGTH + 1)
            and 0 < self.draft_budget < math.inf
        )


@dataclass(frozen=True, slots=True)
class AcceptanceSnapshot:
    """What one replica saw itself, or the sum of several."""

    cells: tuple[CellCount, ...]

    @classmethod
    def of(cls, axes: AcceptanceAxes, examined: Floats, accepted: Floats) -> "AcceptanceSnapshot":
        """Both AcceptanceAxes.shape."""
        cells = []
        for bucket, setting, position in np.argwhere(examined > _LEAST_COUNT).tolist():
            at = (bucket, setting, position)
            counts = float(examined[at]), float(accepted[at])
            cells.append(CellCount(*axes.name(setting), bucket, position + 1, *counts))
        return cls(tuple(cells))


def counts_of(axes: AcceptanceAxes, cells: Sequence[CellCount]) -> tuple[Floats, Floats]:
    """Examined and accepted drafts, AcceptanceAxes.shape; other drafters and later positions than
    are served are left out."""
    examined, accepted = np.zeros(axes.shape), np.zeros(axes.shape)
    for cell in cells:
        if cell.drafter in axes.drafters and cell.position <= axes.max_draft_length:
            context_len = 64 << cell.context_bucket
            setting = axes.setting(cell.drafter, cell.draft_budget, context_len)
            at = (cell.context_bucket, setting, cell.position - 1)
            examined[at] += cell.examined
            accepted[at] += cell.accepted
    return examined, accepted
