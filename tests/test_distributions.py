"""The statistics of the distribution tests are calibrated: their p-values are uniform."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.distributions import conditional_fit, fit, homogeneity, tail_probability

LAW = np.random.default_rng(1).dirichlet(np.full(36, 0.6)).reshape(6, 6)
Draw = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def test_tail_probabilities_of_two_degrees_of_freedom_are_exponential() -> None:
    for statistic in (0.1, 1.0, 18.4, 60.0):
        assert tail_probability(statistic, 2) == pytest.approx(np.exp(-statistic / 2))
    assert tail_probability(37.4, 11) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize(
    "p_value",
    [
        lambda draw: fit(draw(LAW), LAW),
        lambda draw: conditional_fit(draw(LAW), LAW),
        lambda draw: homogeneity(draw(LAW), draw(LAW) + draw(LAW)),
    ],
    ids=["fit", "conditional_fit", "homogeneity"],
)
def test_p_values_of_a_true_law_are_uniform(p_value: Callable[[Draw], float]) -> None:
    """4,000 samples of 500 draws, with rare cells: the share below each level is the level."""
    generator = np.random.default_rng(2)

    def draw(law: NDArray[np.float64]) -> NDArray[np.float64]:
        return generator.multinomial(500, law.ravel()).reshape(law.shape).astype(np.float64)

    p_values = np.array([p_value(draw) for _ in range(4_000)])
    for level in (0.5, 0.1, 0.01):
        assert np.mean(p_values < level) == pytest.approx(level, rel=0.1, abs=0.006)
    assert p_values.min() > 1e-6


def test_a_token_of_probability_zero_fails_at_once() -> None:
    law = np.array([0.5, 0.5, 0.0])
    assert fit(np.array([5000.0, 5000.0, 1.0]), law) == 0.0
    assert conditional_fit(np.array([5000.0, 5000.0, 1.0]), law) == 0.0
