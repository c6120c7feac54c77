"""Plain and drafted rounds take different times beside their forwards, and each is foreseen."""

import math

import pytest

from magicdec.control.round_overhead import RoundOverhead


def test_both_sorts_of_round_are_followed_apart() -> None:
    overhead = RoundOverhead()
    for _ in range(100):
        overhead.observe(0.001, drafted=False)
        overhead.observe(0.004, drafted=True)
    assert overhead.seconds(drafted=False) == pytest.approx(0.001, rel=0.01)
    assert overhead.seconds(drafted=True) == pytest.approx(0.004, rel=0.01)


@pytest.mark.parametrize("drafted", [False, True])
def test_what_was_not_seen_is_as_the_other_until_it_is(drafted: bool) -> None:
    overhead = RoundOverhead()
    assert overhead.seconds(drafted=drafted) == 0.0
    for _ in range(100):
        overhead.observe(0.002, drafted=not drafted)
    assert overhead.seconds(drafted=drafted) == overhead.seconds(drafted=not drafted)
    overhead.observe(0.012, drafted=drafted)
    assert overhead.seconds(drafted=drafted) == pytest.approx(0.003, rel=0.01)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.001, 5.0])
def test_a_time_that_cannot_be_moves_nothing(wrong: float) -> None:
    overhead = RoundOverhead()
    overhead.observe(0.002, drafted=True)
    before = overhead.seconds(drafted=True)
    overhead.observe(wrong, drafted=True)
    assert overhead.seconds(drafted=True) == before
