"""Scores and choice of keys agree with their oracles, and the oracles with the published rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.kernels import selection, selection_reference
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_largest import CpuLargest
from tests.kernels.layouts import make_layout

HEAD_DIM = 16


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 200), st.integers(1, 40), st.integers(1, 40)),
        min_size=1,
        max_size=3,
    ),
    block_size=st.sampled_from([1, 8, 64]),
    contiguous=st.booleans(),
    kv_heads=st.integers(0, 3),
    group_size=st.sampled_from([1, 3, 4, 7]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 10_000),
)
def test_the_mass_agrees_with_the_reference(
    spans: list[tuple[int, int, int]],
    block_size: int,
    contiguous: bool,
    kv_heads: int,
    group_size: int,
    softcap: float | None,
    seed: int,
) -> None:
    """A span is (context, rows, observed rows); odd group sizes have misaligned heads before."""
    query_lens = [q for _, q, _ in spans]
    layout, num_blocks = make_layout(
        [c for c, _, _ in spans], query_lens, block_size, contiguous, seed
    )
    generator = torch.Generator().manual_seed(seed)
    k_cache = torch.randn(kv_heads, num_blocks * block_size, HEAD_DIM, generator=generator)
    for i, (_, rows, observed) in enumerate(spans):
        shape = (kv_heads * group_size, min(rows, observed), HEAD_DIM)
        query = torch.randn(shape, generator=generator)
        case = (query, k_cache, layout, i, 0.25, softcap)
        actual = selection.attention_mass(*case)
        torch.testing.assert_close(
            actual, selection_reference.attention_mass(*case), atol=2e-5, rtol=2e-5
        )


def test_the_mass_of_a_head_is_its_rows_and_its_group() -> None:
    layout, num_blocks = make_layout([100], [32], 8, True, 0)
    k_cache, query = torch.randn(2, num_blocks * 8, HEAD_DIM), torch.randn(6, 32, HEAD_DIM)
    mass = selection.attention_mass(query, k_cache, layout, 0, 0.25)
    torch.testing.assert_close(mass.sum(dim=1), torch.full((2,), 3.0 * 32))


def test_scores_are_scaled_as_the_models_softmax_is() -> None:
    """One query, two keys, by hand: the reference code forgets 1/sqrt(head_dim)."""
    layout, _ = make_layout([1], [1], 2, True, 0)
    k_cache = torch.zeros(1, 6, HEAD_DIM)
    k_cache[0, 2, 0] = 8.0  # position 0
    query = torch.zeros(1, 1, HEAD_DIM)
    query[0, 0, 0] = 1.0
    mass = selection.attention_mass(query, k_cache, layout, 0, HEAD_DIM**-0.5)
    assert mass[0, 0] == pytest.approx(1 / (1 + math.exp(-8 / 4)))


@settings(max_examples=100, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    num_keys=st.integers(1, 90),
    kv_heads=st.integers(0, 3),
    first=st.integers(0, 20),
    recent=st.integers(0, 20),
    count=st.integers(-1, 70),
    pool_size=st.sampled_from([1, 5]),
    chunk_size=st.sampled_from([1, 4, 16]),
    coverage=st.sampled_from([0.2, 0.9, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_the_choice_agrees_with_the_reference(
    num_layers: int,
    num_keys: int,
    kv_heads: int,
    first: int,
    recent: int,
    count: int,
    pool_size: int,
    chunk_size: int,
    coverage: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(num_layers, kv_heads, num_keys, generator=generator)
    first = min(first, num_keys)
    case = (mass, first, max(num_keys - recent, first), count, pool_size, chunk_size, coverage)
    (chosen, needed), (expected, wanted) = (
        selection.rank_top(*case),
        selection_reference.rank_top(*case),
    )
    assert chosen.tolist() == expected.tolist()
    assert needed is None or needed.tolist() == wanted.tolist()
    assert needed is not None or wanted.tolist() == [chosen.shape[2]] * num_layers
    assert coverage < 1.0 or needed is None


def test_a_needle_is_chosen_for_the_head_that_attends_to_it() -> None:
    mass = torch.full((2, 1000), 0.001)
    mass[0, 300], mass[1, 700] = 5.0, 5.0
    for num_layers in (1, 2):  # two heads of a layer, or one of each
        chosen, _ = selection.rank_top(mass.view(num_layers, -1, 1000), 16, 936, 5, pool_size=5)
        needle, other = chosen.flatten(0, 1).tolist()
        assert sorted(needle) == [298, 299, 300, 301, 302]
        assert sorted(other) == [698, 699, 700, 701, 702]


def test_coverage_stops_where_the_neediest_head_has_its_share() -> None:
    mass = torch.full((2, 100), 1e-6)
    mass[0, 50] = 1.0
    mass[1, 20:30] = 0.1
    for layers, expected in ((mass[None], [8]), (mass[:, None], [1, 8])):
        needed = selection.rank_top(layers, 0, 100, 60, coverage=0.75)[1]
        assert needed is not None and needed.tolist() == expected
    assert selection.rank_top(mass[None], 0, 100, 60)[1] is None


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    num_entries=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e30]),
    hidden=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_compiled_largest_entries_are_those_of_the_oracle(
    num_rows: int, num_entries: int, spread: float, hidden: bool, seed: int
) -> None:
    """In its order: a spread of 0 makes zeros of both signs, which are equal."""
    library = compiled_library()
    if library is None:
        pytest.skip("no compiler here")
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_rows, num_entries + 3, generator=generator) * spread
    if hidden:
        wide[:, ::7] = float("-inf")
    scores = wide[:, 1 : num_entries + 1]
    count = int(torch.randint(1, num_entries + 1, (1,), generator=generator))
    actual = CpuLargest(library)(scores, count)
    assert torch.equal(actual, selection_reference.largest_indices(scores, count))
    # Of torch's, equal entries may stand in for each other.
    expected = selection.largest_indices(scores, count)
    assert torch.equal(scores.gather(1, actual), scores.gather(1, expected))
