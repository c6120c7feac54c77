"""Where the K/V of a packed batch lies, and what of it can be read without a copy."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels.transfer import send


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """A PagedLayout as a kernel on a device reads it: int32, tables padded to the longest."""

    row_starts: torch.Tensor  # [batch]
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor  # [batch, longest]
    short: torch.Tensor  # sequences of few rows, the others, and the packed rows of the former
    long: torch.Tensor
    short_rows: torch.Tensor
    most_rows: int  # of a short sequence, and of a long one
    most_long_rows: int
    most_keys: int  # of a short sequence
    block_size: int


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """A packed batch over paged K/V.

        rows        | sequence 0 | sequence 1 |  ...        query_lens[i] rows each
        positions   context_lens[i] .. context_lens[i] + query_lens[i] - 1
        slots       block_tables[i][position // block_size] * block_size + position % block_size

    A row at position p sees positions 0..p (with a sliding window w: p - w + 1..p).
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]  # computed before this step
    block_tables: tuple[NDArray[np.int64], ...]
    block_size: int
    _masks: dict[tuple[int, int, int, int], torch.Tensor] = field(default_factory=dict)
    _packed: dict[int, tuple[NDArray[np.int64], ...]] = field(default_factory=dict)
    _on_device: dict[tuple[torch.device, int], DeviceLayout] = field(default_factory=dict)

    def slots(self, sequence: int, start: int, stop: int) -> NDArray[np.int64]:
        """Slots of positions start..stop-1 of a sequence."""
        positions = np.arange(start, stop)
        blocks = self.block_tables[sequence][positions // self.block_size]
        return np.asarray(blocks * self.block_size + positions % self.block_size)

    def slot_mapping(self) -> NDArray[np.int64]:
        """Slot of every packed row, [num_rows]."""
        spans = zip(self.context_lens, self.query_lens, strict=True)
        return np.concatenate([self.slots(i, c, c + n) for i, (c, n) in enumerate(spans)])

    def padded_tables(self) -> NDArray[np.int64]:
        """[batch, longest], zeros after a shorter one's blocks."""
        longest = max((len(table) for table in self.block_tables), default=0)
        tables = np.zeros((len(self.block_tables), longest), dtype=np.int64)
        for row, table in zip(tables, self.block_tables, strict=True):
            row[: len(table)] = table
        return tables

    def packed(self, most_rows: int) -> tuple[NDArray[np.int64], ...]:
        """For a compiled kernel, the sequences of so many rows at most: where the rows of each
        begin, query_lens, context_lens, their block tables end to end, and where each begins.

        Worked out once a step.
        """
        if most_rows not in self._packed:
            wanted = np.flatnonzero(np.array(self.query_lens) <= most_rows)
            tables = [self.block_tables[i] for i in wanted] or [np.empty(0, dtype=np.int64)]
            query_lens = np.array(self.query_lens, dtype=np.int64)
            lengths = np.array([len(table) for table in tables], dtype=np.int64)
            self._packed[most_rows] = (
                (np.cumsum(query_lens) - query_lens)[wanted],
                query_lens[wanted],
                np.array(self.context_lens, dtype=np.int64)[wanted],
                np.concatenate(tables),
                np.cumsum(lengths) - lengths,
            )
        return self._packed[most_rows]

    def on_device(self, device: torch.device, few_rows: int) -> DeviceLayout:
        """Copied once a step, all of it at once. A short sequence has at most `few_rows`."""
        key = (device, few_rows)
        if key not in self._on_device:
            self._on_device[key] = self._copy(device, few_rows)
        return self._on_device[key]

    def _copy(self, device: torch.device, few_rows: int) -> DeviceLayout:
        query_lens = np.array(self.query_lens, dtype=np.int32)
        context_lens = np.array(self.context_lens, dtype=np.int32)
        row_starts = np.cumsum(query_lens, dtype=np.int32) - query_lens
        is_short = query_lens <= few_rows
        tables = self.padded_tables()
        arrays = (
            row_starts,
            query_lens,
            context_lens,
            tables.reshape(-1),
            np.flatnonzero(is_short),
            np.flatnonzero(~is_short),
            np.flatnonzero(np.repeat(is_short, query_lens)),
        )
        whole = send(torch.from_numpy(np.concatenate(arrays).astype(np.int32)), device)
        parts = whole.split_with_sizes([len(array) for array in arrays])
        return DeviceLayout(
            row_starts=parts[0],
            query_lens=parts[1],
            context_lens=parts[2],
            block_tables=parts[3].view(tables.shape),
            short=parts[4],
            long=parts[5],
            short_rows=parts[6],
            most_rows=int(query_lens[is_short].max(initial=0)),
            most_long_rows=int(query_lens[~is_short].max(initial=0)),
            most_keys=int((query_lens + context_lens)[is_short].max(initial=0)),
            block_size=self.block_size,
        )

    def runs(self, sequence: int, stop: int) -> list[tuple[int, int]]:
        """Maximal spans (first slot, length) of consecutive slots that hold positions 0..stop-1."""
        table = self.block_tables[sequence][: -(-stop // self.block_size)]
        if len(table) == 0:
            return []
        starts = np.flatnonzero(np.diff(table, prepend=table[0] - 2) != 1)
        lengths = np.diff(starts, append=len(table)) * self.block_size
        lengths[-1] -= len(table) * self.block_size - stop
        return [
            (int(table[s]) * self.block_size, int(n)) for s, n in zip(starts, lengths, strict=True)
        ]

    def causal_mask(
        self, query_len: int, num_keys: int, window: int, group_size: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Additive mask for keys that end where the rows end, the GQA group folded into the rows.

        Shared by every layer of the step. Returns [group_size * query_len, num_keys] in like.dtype;
        window 0 means none.
        """
        key = (query_len, num_keys, window, group_size)
        if key not in self._masks:
            mask = causal_mask(query_len, num_keys, window)
            self._masks[key] = mask.to(like.device, like.dtype).repeat(group_size, 1)
        return self._masks[key]


def causal_mask(query_len: int, num_keys: int, window: int) -> torch.Tensor:
    """fp32 [query_len, num_keys]: 0 where the row sees the key, -inf elsewhere."""
    rows = torch.arange(num_keys - query_len, num_keys)[:, None]
    keys = torch.arange(num_keys)[None, :]
    visible = keys <= rows
    if window:
        visible &= rows - keys < window
    return torch.zeros(query_len, num_keys).masked_fill_(~visible, float("-inf"))
