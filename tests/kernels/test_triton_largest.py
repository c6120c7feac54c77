"""Triton chooses the largest entries of rows as their oracle does, on a GPU or interpreted."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from magicdec.kernels import selection, selection_reference, triton_largest

GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INFINITY = float("inf")


def made_up(kind: str, num_rows: int, num_entries: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, num_entries, generator=generator)
    if kind == "mass":
        return (4 * scores).softmax(dim=1)
    if kind == "few":  # and zeros of both signs
        return (scores * 2).trunc() / 2
    if kind == "equal":
        return torch.full_like(scores, 0.25)
    if kind == "hidden":
        return scores.masked_fill(scores < 0, -INFINITY)
    if kind == "mostly zero":
        return scores.relu() * (scores > 1.5)
    return scores * 10.0 ** torch.randint(-44, 38, scores.shape, generator=generator)


@settings(GENERATED, max_examples=60)
@given(
    kind=st.sampled_from(["mass", "few", "equal", "hidden", "mostly zero", "any size"]),
    num_rows=st.integers(0, 3),
    num_entries=st.sampled_from([1, 3, 130, 2047, 4096, 4097, 6000, 12_287, 20_000]),
    share=st.sampled_from([0.0, 1e-9, 0.004, 0.1, 0.7, 0.999, 1.0]),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    seed=st.integers(0, 10_000),
)
@example("mass", 2, 100_001, 0.02, 3, 2, 0)
@example("few", 3, 12_287, 0.1, 1, 0, 0)  # ties among what the sample leaves in doubt
@example("few", 3, 12_287, 0.06, 2, 0, 0)
@example("mostly zero", 3, 20_000, 0.1, 0, 1, 0)  # more of them than are held
def test_the_same_entries_are_chosen_in_the_same_order(
    device: torch.device,
    kind: str,
    num_rows: int,
    num_entries: int,
    share: float,
    before: int,
    after: int,
    seed: int,
) -> None:
    """Of columns out of the middle of wider rows: all, none, or some; ties by position."""
    wide = torch.full((num_rows, before + num_entries + after), INFINITY)
    wide[:, before : before + num_entries] = made_up(kind, num_rows, num_entries, seed)
    scores = wide.to(device)[:, before : before + num_entries]
    count = int(-(-share * num_entries // 1))
    actual = triton_largest.largest_indices(scores, count)
    expected = selection_reference.largest_indices(scores, count)
    assert actual.dtype == torch.long
    assert torch.equal(actual.cpu(), expected)


def sampled_places(num_entries: int) -> torch.Tensor:
    """Where the kernel looks first in a long row: it is right whatever it finds there."""
    size = triton_largest.CONSTANTS["MOST_COUNTED"]
    lanes = torch.arange(size)
    return lanes * num_entries // size + (lanes * 40503 >> 7) % (num_entries // size)


@pytest.mark.parametrize("sampled", [0.5, 8.0])
@pytest.mark.parametrize("count", [1, 600, 6000])
def test_a_sample_that_is_like_nothing_else_misleads_nobody(
    device: torch.device, sampled: float, count: int
) -> None:
    """What is sampled is half or eight times as large as the rest."""
    scores = 1 + made_up("mass", 1, 16_384, 0)
    scores[:, sampled_places(16_384)] *= sampled
    actual = triton_largest.largest_indices(scores.to(device), count)
    assert torch.equal(actual.cpu(), selection_reference.largest_indices(scores, count))


def test_zeros_of_both_signs_are_equal(device: torch.device) -> None:
    for num_entries in (9, 9000):
        scores = torch.full((1, num_entries), -1.0)
        scores[0, 2:8] = torch.tensor([-0.0, 0.0, -0.0, 1e-45, 0.0, -1e-45])
        chosen = triton_largest.largest_indices(scores.to(device), 7).tolist()
        assert chosen == [[5, 2, 3, 4, 6, 7, 0]]


def test_rows_of_scattered_columns_are_chosen_from(device: torch.device) -> None:
    scores = made_up("mass", 700, 3, 0)
    actual = triton_largest.largest_indices(scores.to(device).t(), 50)
    assert torch.equal(actual.cpu(), selection_reference.largest_indices(scores.t(), 50))


@pytest.mark.parametrize("num_entries", [50, 9000])
def test_beside_nans_what_is_chosen_are_positions(device: torch.device, num_entries: int) -> None:
    """Every one of them once at most, so that nothing outside a row is ever read by them."""
    scores = made_up("mass", 2, num_entries, 0).to(device)
    scores[0, ::3], scores[1] = float("nan"), float("nan")
    scores[1].view(torch.int32)[::2] = -1  # of the other sign
    for count in (1, num_entries // 2, num_entries):
        for row in triton_largest.largest_indices(scores, count).tolist():
            assert len(set(row)) == count
            assert min(row) >= 0 and max(row) < num_entries


@settings(GENERATED, max_examples=20)
@given(
    num_keys=st.sampled_from([90, 5000]),
    count=st.integers(-1, 120),
    pool_size=st.sampled_from([1, 5]),
    chunk_size=st.sampled_from([1, 4]),
    coverage=st.sampled_from([0.2, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_positions_are_ranked_as_by_the_reference(
    device: torch.device,
    num_keys: int,
    count: int,
    pool_size: int,
    chunk_size: int,
    coverage: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 1, num_keys, generator=generator)
    case = (3, num_keys - 20, min(count, num_keys - 23), pool_size, chunk_size, coverage)
    rank = partial(selection.rank_top, largest=triton_largest.largest_indices)
    chosen, needed = rank(mass.to(device), *case)
    expected, wanted = selection_reference.rank_top(mass, *case)
    assert chosen.tolist() == expected.tolist()
    assert needed is None or needed.tolist() == wanted.tolist()
