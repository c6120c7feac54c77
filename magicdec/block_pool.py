"""Which block belongs to whom. Blocks are numbers; the tensors are in kv_cache.py."""

from collections.abc import Iterable

import numpy as np


class BlockPool:
    """Hands out blocks, next to the sequence's last one where it can.

    Neighbouring blocks let attention read a context in place instead of copying it, so a new
    sequence starts in the middle of the longest free run, which leaves its neighbour room to grow.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = np.ones(num_blocks, dtype=bool)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks, adjacent to block `after` while they are free.

        Raises ValueError when fewer are free: the caller checks num_free first.
        """
        if count > self._num_free:
            raise ValueError(f"{count} blocks asked for, {self._num_free} free")
        blocks: list[int] = []
        while len(blocks) < count:
            start = self._next_start(blocks[-1] if blocks else after, count - len(blocks))
            stop = start
            while (
                stop < self.num_blocks and self._free[stop] and stop - start < count - len(blocks)
            ):
                stop += 1
            blocks.extend(range(start, stop))
            self._free[start:stop] = False
        self._num_free -= count
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Raises ValueError for a block that is free already."""
        for block in blocks:
            if self._free[block]:
                raise ValueError(f"block {block} is freed twice")
            self._free[block] = True
            self._num_free += 1

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Every block is free or in exactly one table. Raises AssertionError otherwise."""
        owned = [block for table in block_tables for block in table]
        assert len(owned) == len(set(owned)), "a block has two owners"
        assert self._num_free == int(self._free.sum()), "the free count is off"
        assert not self._free[owned].any(), "an owned block is marked free"
        leaked = self.num_blocks - self._num_free - len(owned)
        assert leaked == 0, f"{leaked} blocks have no owner"

    def _next_start(self, after: int | None, count: int) -> int:
        if after is not None and after + 1 < self.num_blocks and self._free[after + 1]:
            return after + 1
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, stops = edges[0::2], edges[1::2]
        longest = int(np.argmax(stops - starts))
        start, spare = int(starts[longest]), int(stops[longest] - starts[longest]) - count
        # Behind an owned block, leave its owner half of the spare room.
        return start + spare // 2 if start > 0 and spare > 0 else start
