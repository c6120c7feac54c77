"""The random integers are those of Philox, and the noise stays in its bounds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.kernels import reference
from magicdec.kernels.gumbel import gumbel_noise, random_words


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40), num_words=st.integers(1, 100)
)
def test_words_equal_the_reference_bit_for_bit(seed: int, position: int, num_words: int) -> None:
    expected = reference.random_words(seed, position, num_words)
    np.testing.assert_array_equal(random_words(seed, position, num_words), expected)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    """An entry keeps its word however many are drawn: a vocabulary shard may draw its own."""
    np.testing.assert_array_equal(random_words(3, 7, 1001)[:64], random_words(3, 7, 64))


def test_noise_stays_within_the_bounds_that_the_sampler_relies_on() -> None:
    noise = gumbel_noise(np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32))
    assert noise.min() > -3.2
    assert noise.max() < 22.9
    assert noise.max() - noise.min() < 26.2
