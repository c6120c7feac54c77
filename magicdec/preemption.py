"""Whose blocks are taken when the pool is full."""

from collections.abc import Sequence

from magicdec.block_pool import BlockPool
from magicdec.sequence import Sequence as ServedSequence


def cheapest_victim(
    running: Sequence[ServedSequence], pool: BlockPool, block_size: int
) -> ServedSequence:
    """The one with the fewest tokens to compute again; of equals the latest.

    Blocks that others hold too stay, and are found again. Never the oldest: whoever is the oldest
    gets to its end, so everybody does. `running` is by arrival and holds two sequences at least.
    """

    def tokens_lost(sequence: ServedSequence) -> int:
        num_shared = pool.num_shared(sequence.block_table)
        return max(sequence.num_computed_tokens - num_shared * block_size, 0)

    return min(reversed(running[1:]), key=tokens_lost)
