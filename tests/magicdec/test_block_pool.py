"""Blocks are never lost, neighbours stay together where they can, known content is found again."""

from itertools import pairwise

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


ACTIONS = st.tuples(
    st.sampled_from(["allocate", "share", "free", "register", "touch"]),
    st.integers(0, 3),  # owner
    st.integers(0, 9),  # a count, or which content
)


@given(num_blocks=st.integers(1, 40), actions=st.lists(ACTIONS, max_size=120))
def test_whatever_is_shared_registered_and_evicted_a_key_finds_its_own_content(
    num_blocks: int, actions: list[tuple[str, int, int]]
) -> None:
    """The model: what each block was filled with; only an allocation fills a block anew."""
    pool = BlockPool(num_blocks)
    tables: dict[int, list[int]] = {owner: [] for owner in range(4)}
    contents: dict[int, bytes] = {}
    for action, owner, number in actions:
        table, key = tables[owner], bytes([number])
        found = pool.find(key)
        if action == "allocate" and number <= pool.num_free:
            new = pool.allocate(number, after=table[-1] if table else None)
            assert not {block for t in tables.values() for block in t} & set(new)
            contents.update(dict.fromkeys(new, b""))
            table += new
        elif action == "share" and found is not None and found not in table:
            pool.share([found])
            table.append(found)
        elif action == "free":
            pool.free(table)
            tables[owner] = []
        elif action == "register" and table and contents[table[-1]] in (b"", key):
            contents[table[-1]] = key
            pool.register(table[-1], key)
        elif action == "touch":
            pool.touch(key)
        pool.check_integrity(tables.values())
        held = {block for t in tables.values() for block in t}
        assert pool.num_free == num_blocks - len(held)
        for name in range(10):
            block = pool.find(bytes([name]))
            assert block is None or contents[block] == bytes([name])


def test_a_growing_sequence_stays_contiguous_beside_others() -> None:
    pool = BlockPool(100)
    first, second = pool.allocate(10), pool.allocate(10)
    for table in (first, second) * 15:
        table += pool.allocate(1, after=table[-1])
    assert first == list(range(first[0], first[0] + 25))
    assert second == list(range(second[0], second[0] + 25))


def idle_chain(pool: BlockPool, name: str, length: int) -> list[int]:
    """Registered blocks that nobody holds, the tail the least recently used."""
    blocks = pool.allocate(length)
    for i, block in enumerate(blocks):
        pool.register(block, f"{name}{i}".encode())
    pool.free(reversed(blocks))
    return blocks


def test_the_least_recently_used_content_is_evicted_first_and_only_when_needed() -> None:
    """A pool under 32 blocks evicts one at a time."""
    pool = BlockPool(9)
    for name in "abc":
        idle_chain(pool, name, 2)
    pool.share([pool.find(b"a0") or 0])
    pool.free([pool.find(b"a0") or 0])
    pool.touch(b"b0")
    assert pool.num_free == 9
    pool.allocate(3)
    names = [f"{name}{i}" for name in "abc" for i in range(2)]
    assert all(pool.find(name.encode()) is not None for name in names)
    for gone in ("a1", "b1", "c1", "c0", "a0", "b0"):
        pool.allocate(1)
        names.remove(gone)
        assert [n for n in names if pool.find(n.encode()) is None] == []
        assert pool.find(gone.encode()) is None


def test_sequences_that_grow_by_eviction_stay_in_long_runs() -> None:
    """Blocks evicted one by one, tail first, would be handed out backwards and in turns."""
    pool = BlockPool(640)
    for i in range(6):
        idle_chain(pool, str(i), 100)
    tables = [pool.allocate(10) for _ in range(4)]  # the 40 that were free
    for table in tables * 50:
        table += pool.allocate(1, after=table[-1])
    for table in tables:
        num_runs = 1 + sum(b != a + 1 for a, b in pairwise(table))
        assert len(table) / num_runs >= 3


def test_a_second_block_of_the_same_content_is_not_registered() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, b"key")
    pool.register(second, b"key")
    assert pool.find(b"key") == first
    assert pool.key_of(second) is None
    pool.free([second, first])
    pool.check_integrity([])
    assert pool.find(b"key") == first


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


def test_a_block_of_unknown_content_is_neither_shared_nor_registered() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match=f"block {block} is shared but not registered"):
        pool.share([block])
    pool.register(block, b"key")
    with pytest.raises(ValueError, match="under another key"):
        pool.register(block, b"other")
    with pytest.raises(ValueError, match="registered but not held"):
        pool.register(3 - block, b"other")


def test_check_integrity_sees_a_block_held_more_often_than_counted() -> None:
    pool = BlockPool(4)
    table = pool.allocate(2)
    with pytest.raises(AssertionError, match="1 references, 2 owners"):
        pool.check_integrity([table, table])
    with pytest.raises(AssertionError, match="1 references, 0 owners"):
        pool.check_integrity([])
