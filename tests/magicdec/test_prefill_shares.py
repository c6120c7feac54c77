"""How a step's prefill rows are divided: nothing wasted, nobody starves, windows stay whole."""

from hypothesis import given
from hypothesis import strategies as st

from magicdec.config import OBSERVATION_WINDOW
from magicdec.prefill_shares import prefill_shares


def test_a_short_prompt_behind_a_long_one_is_computed_at_once() -> None:
    assert prefill_shares([7000, 100], 512) == [412, 100]


def test_the_oldest_has_half_and_equals_share_the_rest() -> None:
    assert prefill_shares([7000, 7000, 7000], 512) == [256, 128, 128]


def test_what_one_cannot_use_goes_to_the_others() -> None:
    assert prefill_shares([10, 7000, 7000], 512) == [10, 251, 251]
    assert prefill_shares([40, 7000], 512) == [40, 472]


@given(st.lists(st.integers(1, 8000), max_size=16), st.integers(0, 2048))
def test_shares_are_chunks_within_the_rows(left: list[int], num_rows: int) -> None:
    shares = prefill_shares(left, num_rows)
    assert len(shares) == len(left)
    assert sum(shares) <= num_rows
    for share, num_left in zip(shares, left, strict=True):
        assert share == num_left or 0 <= share <= max(num_left - OBSERVATION_WINDOW, 0)
    if left and num_rows >= OBSERVATION_WINDOW:
        assert shares[0] > 0, "the oldest does not get on"
    wasted = num_rows - sum(shares)
    unserved = [n - s for n, s in zip(left, shares, strict=True)]
    # What nobody took is too little for anyone: a whole window has to stay or to go.
    assert (
        wasted == 0
        or all(n <= max(OBSERVATION_WINDOW, 0) for n in unserved if n > 0)
        or (wasted < OBSERVATION_WINDOW)
    )
