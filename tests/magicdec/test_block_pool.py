"""Blocks are never lost or shared, and neighbours stay together where they can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.block_pool import BlockPool


@given(
    num_blocks=st.integers(1, 40),
    actions=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=60),
)
def test_any_order_of_growing_and_freeing_keeps_the_pool_whole(
    num_blocks: int, actions: list[tuple[int, int]]
) -> None:
    """Action (owner, n): grow by n where that many are free, or give all back for n = 0."""
    pool = BlockPool(num_blocks)
    tables: dict[int, list[int]] = {owner: [] for owner in range(4)}
    for owner, count in actions:
        table = tables[owner]
        if count == 0:
            pool.free(table)
            tables[owner] = []
        elif count <= pool.num_free:
            table += pool.allocate(count, after=table[-1] if table else None)
        pool.check_integrity(tables.values())
        assert pool.num_free == num_blocks - sum(len(t) for t in tables.values())


def test_a_growing_sequence_stays_contiguous_beside_others() -> None:
    pool = BlockPool(100)
    first, second = pool.allocate(10), pool.allocate(10)
    for table in (first, second) * 15:
        table += pool.allocate(1, after=table[-1])
    assert first == list(range(first[0], first[0] + 25))
    assert second == list(range(second[0], second[0] + 25))


def test_a_block_freed_twice_is_refused() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)


def test_more_than_is_free_is_refused() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
