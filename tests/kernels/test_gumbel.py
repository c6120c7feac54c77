"""The random integers are those of Philox; over seeds, positions, entries and roles they are
uniform and independent; the noise stays in its bounds and its argmax has the softmax law."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magicdec.kernels import reference
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_gumbel import CpuGumbelArgmax
from magicdec.kernels.dispatch import select_gumbel_argmax
from magicdec.kernels.gumbel import (
    Draw,
    Role,
    Scaling,
    gumbel_argmax,
    gumbel_noise,
    random_words,
    uniforms,
)
from tests.distributions import FALSE_ALARM, fit
from tests.kernels.choices import DRAWS, made_up_scores

LIBRARY = compiled_library()
needs_compiler = pytest.mark.skipif(LIBRARY is None, reason="there is no compiler here")
NUM_SEEDS, NUM_POSITIONS, NUM_ENTRIES = 40, 40, 64
Words = Callable[[int, int, int, int, int], NDArray[np.uint32]]
Grid = NDArray[np.uint32]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    num_words=st.integers(1, 100),
    role=st.sampled_from(Role),
    step=st.integers(0, 16),
)
def test_words_equal_the_reference_bit_for_bit(
    seed: int, position: int, num_words: int, role: Role, step: int
) -> None:
    expected = reference.random_words(seed, position, num_words, role, step)
    np.testing.assert_array_equal(random_words(seed, position, num_words, role, step), expected)


def test_shared_noise_keeps_its_values() -> None:
    """A stream that began before roles existed resumes on them."""
    words = random_words(5, 7, 4)
    assert words.tolist() == [3414292854, 2153770247, 2483589764, 189261583]
    np.testing.assert_array_equal(words, random_words(5, 7, 4, Role.SHARED, 0))


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(
    num_entries=st.integers(1, 300),
    spread=st.floats(0.0, 40.0),
    removed=st.floats(0.0, 0.9),
    draws=DRAWS,
    seed=st.integers(0, 10_000),
)
def test_compiled_code_chooses_the_same_entries(
    num_entries: int, spread: float, removed: float, draws: list[Draw | None], seed: int
) -> None:
    """Ties among them: a spread of 0 makes all scores equal."""
    scores = made_up_scores(len(draws), num_entries, spread, removed, seed)
    assert LIBRARY is not None
    choose = CpuGumbelArgmax(LIBRARY)
    assert choose(scores, draws).token_ids() == gumbel_argmax(scores, draws).token_ids()


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(
    num_entries=st.integers(1, 300),
    spread=st.floats(0.0, 40.0),
    removed=st.floats(0.0, 0.9),
    temperature=st.sampled_from([1e-5, 0.3, 1.0, 1.7, 50.0]),
    far=st.sampled_from([0.0, -300.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    draws=DRAWS,
    seed=st.integers(0, 10_000),
)
def test_compiled_code_scales_logits_as_others_do(
    num_entries: int,
    spread: float,
    removed: float,
    temperature: float,
    far: float,
    dtype: torch.dtype,
    draws: list[Draw | None],
    seed: int,
) -> None:
    """Bit for bit: a part of the vocabulary, whose greatest logit may be another part's."""
    logits = (made_up_scores(len(draws), num_entries, spread, removed, seed) + far).to(dtype)
    temperatures = torch.tensor([0.0 if draw is None else temperature for draw in draws])
    others = torch.rand(len(draws), generator=torch.Generator().manual_seed(seed))
    scaling = Scaling(logits.float().amax(dim=1) + others.round(), temperatures)
    assert LIBRARY is not None
    found = CpuGumbelArgmax(LIBRARY)(logits, draws, 8, scaling)
    expected = gumbel_argmax(logits, draws, 8, scaling)
    assert torch.equal(found.chosen(), expected.chosen())
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_whose_distances_order_nothing_are_refused(bad: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 41)
    logits[1, 7 if bad > 0 or bad != bad else slice(None)] = bad
    logits = logits.to(dtype)
    scaling = Scaling(logits.float().amax(dim=1), torch.ones(2))
    for choose in (gumbel_argmax, select_gumbel_argmax(torch.device("cpu"))):
        with pytest.raises(ValueError, match="row 1 of the scores holds a NaN, or nothing above"):
            choose(logits, [Draw(1, 2), Draw(1, 3)], 0, scaling).token_ids()


@settings(max_examples=100, deadline=None)
@given(
    first_block=st.integers(0, 5),
    num_entries=st.integers(1, 100),
    spread=st.floats(0.0, 40.0),
    draws=DRAWS,
    seed=st.integers(0, 10_000),
)
def test_a_part_of_the_vocabulary_has_the_wholes_noise(
    first_block: int, num_entries: int, spread: float, draws: list[Draw | None], seed: int
) -> None:
    """What stands before it might as well be removed, whichever code chooses."""
    first = 8 * first_block
    scores = made_up_scores(len(draws), num_entries, spread, 0.3, seed)
    whole = torch.nn.functional.pad(scores, (first, 0), value=float("-inf"))
    for choose in (gumbel_argmax, select_gumbel_argmax(torch.device("cpu"))):
        part, expected = choose(scores, draws, first), choose(whole, draws)
        assert torch.equal(part.values, expected.values)
        assert torch.equal(part.entries, expected.entries)
        with pytest.raises(ValueError, match="first_entry must be a multiple of 8, got 12"):
            choose(scores, draws, 12)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scores_that_order_nothing_are_refused(bad: float, device: str) -> None:
    """By compiled code as by that which serves other devices."""
    choose = select_gumbel_argmax(torch.device(device))
    scores = torch.zeros(3, 41)
    scores[1] = bad
    for draw in (None, Draw(1, 2)):
        with pytest.raises(ValueError, match="row 1 of the scores holds a NaN, or nothing above"):
            choose(scores, [None, draw, None]).token_ids()
    with pytest.raises(ValueError, match=r"draws must be one a row \(3\), got 2"):
        choose(scores, [None, None])


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    """An entry keeps its word however many are drawn: a vocabulary shard may draw its own."""
    np.testing.assert_array_equal(random_words(3, 7, 1001)[:64], random_words(3, 7, 64))


def test_noise_stays_within_the_bounds_that_the_sampler_relies_on() -> None:
    noise = gumbel_noise(np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32))
    assert noise.min() > -3.2
    assert noise.max() < 22.9
    assert noise.max() - noise.min() < 26.2


def test_a_uniform_times_any_probability_is_below_it() -> None:
    """So a draft that the target likes at least as well is never rejected by rounding."""
    highest = uniforms(np.array([2**32 - 1], dtype=np.uint32))[0]
    q = np.exp2(-np.arange(0.0, 1000.0, 0.37))
    assert (highest * q < q).all()
    assert uniforms(np.array([0], dtype=np.uint32))[0] > 0


def grid(words: Words, role: Role = Role.SHARED, step: int = 0) -> Grid:
    """[num_seeds, num_positions, num_entries]"""
    return np.array(
        [
            [words(s, t, NUM_ENTRIES, role, step) for t in range(NUM_POSITIONS)]
            for s in range(NUM_SEEDS)
        ]
    )


def joint_fit(a: Grid, b: Grid) -> float:
    """p-value that pairs of words fill the 16 x 16 cells of their top bits evenly."""
    cells = (a.ravel() >> 28) * 16 + (b.ravel() >> 28)
    counts = np.bincount(cells, minlength=256).astype(np.float64)
    return fit(counts, np.full(256, 1 / 256))


def independence(words: Words) -> dict[str, float]:
    """p-values of what must know nothing of one another; every pair is of distinct words."""
    shared, propose = grid(words), grid(words, Role.PROPOSE)
    accept, recover = grid(words, Role.ACCEPT), grid(words, Role.RECOVER)
    return {
        "positions": joint_fit(shared[:, ::2], shared[:, 1::2]),
        "seeds": joint_fit(shared[::2], shared[1::2]),
        "seed and position": joint_fit(shared[1::2, :-1], shared[::2, 1:]),
        "neighbouring entries": joint_fit(shared[..., ::2], shared[..., 1::2]),
        "entries of two blocks": joint_fit(shared[..., :8], shared[..., 8:16]),
        "shared and propose": joint_fit(shared, propose),
        "propose and accept": joint_fit(propose, accept),
        "propose and recover": joint_fit(propose, recover),
        "accept and recover": joint_fit(accept, recover),
        "steps": joint_fit(propose, grid(words, Role.PROPOSE, step=1)),
        "step and position": joint_fit(propose[:, 1:], grid(words, Role.PROPOSE, step=1)[:, :-1]),
    }


def test_words_are_uniform() -> None:
    """Each byte of 100,000 words, every role. False alarms: 1.6e-3, the least of 16 p-values."""
    for role in Role:
        bytes_of = grid(random_words, role).ravel().view(np.uint8).reshape(-1, 4)
        for i in range(4):
            counts = np.bincount(bytes_of[:, i], minlength=256).astype(np.float64)
            assert fit(counts, np.full(256, 1 / 256)) > FALSE_ALARM


def test_words_of_neighbours_are_independent() -> None:
    """False alarms: 1.1e-3, the least of 11 p-values."""
    assert min(independence(random_words).values()) > FALSE_ALARM


def no_position(seed: int, position: int, n: int, role: int, step: int) -> Grid:
    return random_words(seed, 0, n, role, step)


def sum_of_both(seed: int, position: int, n: int, role: int, step: int) -> Grid:
    return random_words(seed + position, 0, n, role, step)


def one_role(seed: int, position: int, n: int, role: int, step: int) -> Grid:
    return random_words(seed, position, n, min(role, Role.PROPOSE), step)


def no_step(seed: int, position: int, n: int, role: int, step: int) -> Grid:
    return random_words(seed, position, n, role)


def first_position_of_round(seed: int, position: int, n: int, role: int, step: int) -> Grid:
    return random_words(seed, position + step, n, role)


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (no_position, {"positions"}),
        (sum_of_both, {"seed and position"}),
        (one_role, {"propose and accept", "propose and recover", "accept and recover"}),
        (no_step, {"steps"}),
        (first_position_of_round, {"step and position"}),
    ],
)
def test_noise_that_is_shared_is_found(words: Words, pairs: set[str]) -> None:
    """The same statistics, of keys that forget a part of what they must tell apart.

    Words that come twice may disturb other pairs too.
    """
    found = {name for name, p_value in independence(words).items() if p_value < FALSE_ALARM}
    assert pairs <= found


def argmax_fits(words: Words) -> tuple[float, float]:
    """p-values: one position's argmax, and the pair of two neighbours', over 8,000 pairs."""
    law = np.random.default_rng(0).dirichlet(np.full(8, 0.7))
    drawn = np.array(
        [[words(s, t, 8, Role.SHARED, 0) for t in range(40)] for s in range(400)]
    )  # [num_seeds, num_positions, num_entries]
    tokens = (np.log(law) + gumbel_noise(drawn)).argmax(axis=-1)
    first = np.bincount(tokens[:, ::2].ravel(), minlength=8).astype(np.float64)
    pairs = np.bincount((tokens[:, ::2] * 8 + tokens[:, 1::2]).ravel(), minlength=64)
    return fit(first, law), fit(pairs.astype(np.float64), np.outer(law, law).ravel())


def test_the_argmax_of_log_p_plus_noise_has_the_law_p() -> None:
    """False alarms: 2e-4, the lesser of two p-values."""
    assert min(argmax_fits(random_words)) > FALSE_ALARM


def test_an_argmax_that_repeats_at_the_next_position_is_found() -> None:
    def halved(seed: int, position: int, n: int, role: int, step: int) -> Grid:
        return random_words(seed, position // 2, n, role, step)

    marginal, pairs = argmax_fits(halved)
    assert marginal > FALSE_ALARM > pairs
