"""Which blocks of a sequence another one may share, and under which keys they are found.

A block's key is a chained hash: of its own tokens and of the key before it, so of everything its
K/V depend on. A block is registered once every token in it is accepted and its K/V came from
prefill or verify, and is never written again: rows are written at num_computed_tokens and above.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from magicdec.block_pool import BlockPool
from magicdec.config import OBSERVATION_WINDOW
from magicdec.sequence import Sequence

_KEY_BYTES = 16


class PrefixCache:
    """Reads and fills a sequence's `block_hashes`; the pool keeps and evicts the blocks."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def match(self, sequence: Sequence) -> list[int]:
        """The longest run of blocks that holds the sequence's first tokens, for it to share.

        At least OBSERVATION_WINDOW tokens, or all of a shorter sequence, stay to be computed: the
        last one for its logits, the others because drafters choose their view by those rows.
        """
        blocks: list[int] = []
        if not self._enabled:
            return blocks
        most = max(len(sequence.token_ids) - OBSERVATION_WINDOW, 0) // self._block_size
        self._extend_hashes(sequence, most)
        for key in sequence.block_hashes[:most]:
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, sequence: Sequence) -> None:
        """Makes the blocks filled since the last call findable.

        Called where token_ids are certain: num_computed_tokens runs ahead of them while a step's
        tokens are appended, and stays ahead when a stop cut an accepted draft.
        """
        num_known = sequence.num_registered_blocks
        if sequence.num_computed_tokens < (num_known + 1) * self._block_size or not self._enabled:
            return  # in most rounds no block is filled
        num_full = self._num_full_blocks(sequence)
        if num_full <= num_known:
            return
        self._extend_hashes(sequence, num_full)
        for i in range(num_known, num_full):
            self._pool.register(sequence.block_table[i], sequence.block_hashes[i])
        sequence.num_registered_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's blocks back; the registered ones stay findable until evicted."""
        # Keys that another sequence's blocks held, and that were evicted since, are this one's now.
        sequence.num_registered_blocks = 0
        self.register(sequence)
        self._pool.free(sequence.block_table)
        # A block without the ones before it is never found: a chain is evicted from its tail.
        for key in reversed(sequence.block_hashes[: sequence.num_registered_blocks]):
            self._pool.touch(key)
        sequence.hold_blocks(())
        sequence.num_registered_blocks = 0

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """A registered block is full, and known by the tokens of every sequence that holds it.

        Raises AssertionError otherwise.
        """
        for sequence in running:
            num_full = self._num_full_blocks(sequence)
            for i, block in enumerate(sequence.block_table):
                key = self._pool.key_of(block)
                if key is not None:
                    assert i < num_full, f"block {block} is registered before it is full"
                    self._extend_hashes(sequence, i + 1)
                    assert key == sequence.block_hashes[i], f"block {block} holds other tokens"

    def _num_full_blocks(self, sequence: Sequence) -> int:
        certain = min(sequence.num_computed_tokens, len(sequence.token_ids))
        return certain // self._block_size

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        """Tokens are only ever appended, so a key once made stays true."""
        hashes, size = sequence.block_hashes, self._block_size
        for i in range(len(hashes), num_blocks):
            tokens = np.array(sequence.token_ids[i * size : (i + 1) * size], dtype=np.int64)
            parent = hashes[-1] if hashes else b""
            content = parent + tokens.tobytes()
            hashes.append(hashlib.blake2b(content, digest_size=_KEY_BYTES).digest())
