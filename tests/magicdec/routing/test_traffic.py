"""Expected answers and the drain rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.traffic import DrainRate, OutputEstimate


def test_nothing_seen_reserves_the_limit() -> None:
    assert OutputEstimate().expected(4096) == 4096


def test_what_was_seen_replaces_the_limit() -> None:
    outputs = OutputEstimate()
    seen = []
    for _ in range(50):
        outputs.learn(8000, 300)
        seen.append(outputs.expected(8000))
    assert seen == sorted(seen, reverse=True)
    assert 300 < seen[-1] < 600
    assert outputs.expected(40) == 40  # another limit, another kind of client


def test_new_habits_replace_old_ones() -> None:
    outputs = OutputEstimate()
    for length in [100] * 400 + [2000] * 600:
        outputs.learn(8000, length)
    assert outputs.expected(8000) == pytest.approx(2000, rel=0.1)


def test_a_long_answer_is_expected_to_be_one_of_the_long_ones() -> None:
    outputs = OutputEstimate()
    for length in [20, 3000] * 90:
        outputs.learn(4096, length)
    assert outputs.expected(4096) == pytest.approx(1530, rel=0.1)
    assert outputs.expected(4096, 500) == pytest.approx(3000, rel=0.1)


@given(
    st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**40)), max_size=30),
    st.integers(1, 2**40),
    st.data(),
)
def test_more_than_there_is_and_no_more_than_the_limit(
    answers: list[tuple[int, int]], limit: int, data: st.DataObject
) -> None:
    outputs = OutputEstimate()
    for max_tokens, length in answers:
        outputs.learn(max_tokens, min(length, max_tokens))
    done = data.draw(st.integers(0, limit))
    expected = outputs.expected(limit, done)
    assert min(done + 1, limit) <= expected <= limit


def drain() -> DrainRate:
    return DrainRate(least_s=1.0, most_s=60.0, unknown_s=5.0)


def test_an_unmeasured_rate_is_not_guessed() -> None:
    rate = drain()
    assert rate.tokens_per_s(10.0) is None
    assert rate.retry_after_s(10_000, 10.0) == 5.0
    rate.sent(100, 10.0)
    assert rate.tokens_per_s(10.1) is None  # a burst is no rate yet


def test_retry_after_is_when_what_waits_has_been_sent() -> None:
    rate = drain()
    for second in range(60):
        rate.sent(1000, float(second))
        rate.finished(1000, float(second))
    assert rate.tokens_per_s(60.0) == pytest.approx(1000, rel=0.05)
    assert rate.retry_after_s(20_000, 60.0) == pytest.approx(20, rel=0.05)
    assert rate.retry_after_s(10, 60.0) == 1.0
    assert rate.retry_after_s(10**9, 60.0) == 60.0


def test_filling_the_replicas_is_no_drain() -> None:
    rate = drain()
    rate.finished(100, 0.0)
    for second in range(30):
        rate.sent(5000, float(second))
        rate.finished(100, float(second))
    assert rate.tokens_per_s(30.0) == pytest.approx(100, rel=0.2)


def test_a_standstill_is_seen() -> None:
    rate = drain()
    for second in range(60):
        rate.sent(1000, float(second))
        rate.finished(1000, float(second))
    assert rate.retry_after_s(30_000, 160.0) == 60.0


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 10**9)), max_size=20),
    st.integers(0, 10**12),
)
def test_retry_after_stays_in_its_range(steps: list[tuple[float, int]], waiting: int) -> None:
    rate, now = drain(), 0.0
    for seconds, tokens in steps:
        now += seconds
        rate.sent(tokens, now)
        rate.finished(tokens // 2, now)
        assert 1.0 <= rate.retry_after_s(waiting, now) <= 60.0
