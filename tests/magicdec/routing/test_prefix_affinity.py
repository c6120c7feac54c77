"""Coarse hashes of how prompts begin, and the bounded memory of who has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.prefix_affinity import (
    PrefixAffinity,
    num_prefix_hashes,
    num_prefix_tokens,
    prefix_hashes,
)

POOL = 100_000  # KV tokens of a replica


@pytest.mark.parametrize(
    ("num_tokens", "num_hashes"),
    [(0, 0), (255, 0), (256, 1), (1000, 3), (1023, 3), (1024, 4), (2047, 4), (2048, 5), (3072, 6)],
)
def test_hashes_are_finer_where_system_prompts_end(num_tokens: int, num_hashes: int) -> None:
    assert num_prefix_hashes(num_tokens) == num_hashes
    assert len(prefix_hashes(range(num_tokens))) == num_hashes


@given(st.integers(0, 300_000))
def test_hashes_cover_whole_chunks_alone(num_tokens: int) -> None:
    count = num_prefix_hashes(num_tokens)
    assert num_prefix_tokens(count) <= num_tokens < num_prefix_tokens(count + 1)


@given(
    st.lists(st.integers(0, 3), max_size=3000),
    st.integers(0, 3000),
)
def test_prompts_share_the_hashes_of_what_they_share(tokens: list[int], changed: int) -> None:
    other = list(tokens)
    if changed < len(other):
        other[changed] += 7
    shared = num_prefix_hashes(min(changed, len(tokens)))
    ours, theirs = prefix_hashes(tokens), prefix_hashes(other)
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs[shared:])
    assert all(0 <= h < 2**64 for h in ours)


def test_the_longest_shared_prefix_is_what_is_cached() -> None:
    affinity = PrefixAffinity(100)
    affinity.record("a", (1, 2, 3, 4, 5), 2048)
    affinity.record("b", (1, 2), 512)
    prompt = (1, 2, 3, 4, 9)
    assert affinity.num_cached_tokens("a", prompt, POOL) == 1024
    assert affinity.num_cached_tokens("b", prompt, POOL) == 512
    assert affinity.num_cached_tokens("c", prompt, POOL) == 0
    assert affinity.homes(prompt) == ["a", "b"]
    assert affinity.homes((8, 9)) == []


def test_a_replica_forgets_what_it_was_sent_a_pool_ago() -> None:
    affinity = PrefixAffinity(100)
    affinity.record("a", (1,), 256)
    affinity.record("a", (2,), POOL - 1)
    assert affinity.num_cached_tokens("a", (1,), POOL) == 256
    affinity.record("a", (3,), 1)
    assert affinity.num_cached_tokens("a", (1,), POOL) == 0
    affinity.record("a", (1,), 256)
    assert affinity.num_cached_tokens("a", (1,), POOL) == 256


def test_a_death_empties_the_cache() -> None:
    affinity = PrefixAffinity(100)
    affinity.record("a", (1, 2), 512)
    affinity.record("b", (1,), 256)
    affinity.forget("a")
    assert affinity.homes((1, 2)) == ["b"]
    assert len(affinity) == 1


def test_a_router_that_is_told_knows_again() -> None:
    affinity = PrefixAffinity(100)
    affinity.recall("a", [(1, 2), (7,)])
    assert affinity.num_cached_tokens("a", (1, 2, 3), POOL) == 512
    assert affinity.num_cached_tokens("a", (7,), POOL) == 256


@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=12), max_size=60))
def test_the_memory_is_bounded_and_drops_ends_before_starts(prompts: list[list[int]]) -> None:
    affinity = PrefixAffinity(20)
    for hashes in prompts:
        affinity.record("a", tuple(dict.fromkeys(hashes)), 10)
        assert len(affinity) <= 20
        assert affinity.homes(hashes[:1]) == ["a"]


def test_few_replicas_are_remembered_for_one_prefix() -> None:
    affinity = PrefixAffinity(20)
    for name in "abcdefgh":
        affinity.record(name, (1,), 256)
    assert affinity.homes((1,)) == ["h", "g", "f", "e"]
