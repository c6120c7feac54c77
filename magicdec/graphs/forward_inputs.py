"""What a captured forward reads at fixed places, as a step is written to them on the host."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.kernels.paged_layout import PagedLayout

TIERS = (1, 2, 3, 5, 7, 9)
MOST_ROWS = max(TIERS)
NO_SLOT = -1  # of a row that is not there


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a graph, and of the int32 buffer that it reads."""

    bucket: int
    tier: int
    num_columns: int  # of the block tables

    @property
    def num_rows(self) -> int:
        return self.bucket * self.tier

    @property
    def sizes(self) -> list[int]:
        """Of token ids, positions, slots and kept rows, a row; query_lens, context_lens and tables,
        a sequence."""
        return [self.num_rows] * 4 + [self.bucket] * 2 + [self.bucket * self.num_columns]


class ForwardInputs:
    """A shape's buffer on the host, as a step is written to it."""

    def __init__(self, shape: Shape, buffer: NDArray[np.int32]) -> None:
        self._tier = shape.tier
        (
            self._token_ids,
            self._positions,
            self._slots,
            self._kept,
            self._query_lens,
            self._context_lens,
            tables,
        ) = np.split(buffer, np.cumsum(shape.sizes)[:-1])
        self._tables = tables.reshape(shape.bucket, -1)

    def write(
        self, layout: PagedLayout, token_ids: NDArray[np.int64], keep: NDArray[np.int64]
    ) -> None:
        """`token_ids` are the packed rows', `keep` some of those rows."""
        batch = len(layout.query_lens)
        # Rows that are not there are computed too: a reference left of an earlier step is no token.
        self._token_ids[:] = 0
        self._slots[:] = NO_SLOT
        self._query_lens[:] = 0
        self._query_lens[:batch] = layout.query_lens
        self._context_lens[:batch] = layout.context_lens
        for row, table in zip(self._tables, layout.block_tables, strict=False):
            row[: len(table)] = table
        sequences, within = _packed_rows(layout)
        rows, size = self._tier * sequences + within, layout.block_size
        own = self._context_lens[sequences] + within
        self._token_ids[rows], self._positions[rows] = token_ids, own
        self._slots[rows] = self._tables[sequences, own // size] * size + own % size
        self._kept[: len(keep)] = rows[keep]


def _packed_rows(layout: PagedLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each packed row, its sequence and which of the sequence's rows it is."""
    query_lens = np.array(layout.query_lens)
    sequences = np.repeat(np.arange(len(query_lens)), query_lens)
    starts = np.cumsum(query_lens) - query_lens
    return sequences, np.arange(len(sequences)) - starts[sequences]
