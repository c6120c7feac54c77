"""Which block belongs to whom, and which content is found where. Blocks are numbers; the tensors
are in kv_cache.py."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from magicdec.stats import KvBlocks


class BlockPool:
    """Hands out blocks, next to the sequence's last one where it can, and counts references.

        free        in no table
        referenced  in one table, or in several that share it
        idle        in no table, but its content is registered: found by its key until evicted

    Neighbouring blocks let attention read a context in place instead of copying it, so a new
    sequence starts in the middle of the longest free run, which leaves its neighbour room to grow.
    For the same reason blocks are evicted several at a time: the tail of one chain, side by side.
    Keys are opaque here: prefix_cache.py makes them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._eviction_span = max(num_blocks // 16, 1)
        self._free = np.ones(num_blocks, dtype=bool)
        self._num_empty = num_blocks  # entries of _free that are set
        self._num_references = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be had: idle ones are evicted when they are needed."""
        return self._num_empty + len(self._idle)

    def usage(self) -> KvBlocks:
        num_idle = len(self._idle)
        return KvBlocks(self.num_blocks - self.num_free, num_idle, self._num_empty)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks, adjacent to block `after` while they are free.

        Raises ValueError when fewer can be had: the caller checks num_free first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        if count > self._num_empty:
            self._evict(max(count, self._eviction_span))
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
        self._num_empty -= count
        for block in blocks:
            self._num_references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each. Raises ValueError for a block whose content nobody knows."""
        for block in blocks:
            if block not in self._keys:
                raise ValueError(f"block {block} is shared but not registered")
            self._idle.pop(block, None)
            self._num_references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One reference less to each. Raises ValueError for a block that has none."""
        for block in blocks:
            if self._num_references[block] == 0:
                raise ValueError(f"block {block} is freed twice")
            self._num_references[block] -= 1
            if self._num_references[block] > 0:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._mark_free(block)

    def register(self, block: int, key: bytes) -> None:
        """Makes a referenced block findable. Where another block has the key already, that one
        stays. Raises ValueError for a block without a reference or with another key."""
        if self._num_references[block] == 0:
            raise ValueError(f"block {block} is registered but not held")
        if self._keys.get(block, key) != key:
            raise ValueError(f"block {block} is registered under another key")
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def find(self, key: bytes) -> int | None:
        return self._blocks.get(key)

    def touch(self, key: bytes) -> None:
        """Makes the key's block the last to be evicted, if it is idle."""
        block = self._blocks.get(key)
        if block is not None and block in self._idle:
            self._idle.move_to_end(block)

    def key_of(self, block: int) -> bytes | None:
        return self._keys.get(block)

    def num_referenced(self, blocks: Iterable[int]) -> int:
        """How many of these are in a table, and so not counted by num_free."""
        return sum(self._num_references[block] > 0 for block in blocks)

    def num_shared(self, blocks: Iterable[int]) -> int:
        """How many of these are in more than one table."""
        return sum(self._num_references[block] > 1 for block in blocks)

    def check_integrity(self, block_tables: Iterable[Iterable[int]]) -> None:
        """Every block is free, idle, or referenced just as often as tables hold it; only a
        registered one is held twice. Raises AssertionError otherwise."""
        held = Counter(block for table in block_tables for block in set(table))
        assert self._num_empty == int(self._free.sum()), "the free count is off"
        assert self._blocks == {key: block for block, key in self._keys.items()}, "keys disagree"
        for block, references in enumerate(self._num_references):
            owners = held[block]
            assert references == owners, f"block {block}: {references} references, {owners} owners"
            registered = block in self._keys
            assert registered or references < 2, f"block {block} is shared but not registered"
            assert (block in self._idle) == (registered and references == 0), f"idle block {block}"
            assert self._free[block] == (not registered and references == 0), f"free block {block}"

    def _evict(self, count: int) -> None:
        """Frees `count` idle blocks or all of them, the least recently used first."""
        for _ in range(min(count, len(self._idle))):
            block, _ = self._idle.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
            self._mark_free(block)

    def _mark_free(self, block: int) -> None:
        self._free[block] = True
        self._num_empty += 1

    def _next_start(self, after: int | None, count: int) -> int:
        if after is not None and after + 1 < self.num_blocks and self._free[after + 1]:
            return after + 1
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, stops = edges[0::2], edges[1::2]
        longest = int(np.argmax(stops - starts))
        start, spare = int(starts[longest]), int(stops[longest] - starts[longest]) - count
        # Behind an owned block, leave its owner half of the spare room.
        return start + spare // 2 if start > 0 and spare > 0 else start
