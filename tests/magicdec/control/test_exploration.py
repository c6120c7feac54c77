"""The account of trials: what it holds, and what lapses."""

import pytest

from magicdec.control.exploration import ExplorationAccount


@pytest.mark.parametrize("are_new", [True, False])
def test_what_long_rounds_paid_in_lapses_among_short_ones(are_new: bool) -> None:
    """Credit is asked for in hundredths of a plain round: 5 s, then the 0.4 s of four rounds."""
    account = ExplorationAccount(0.01)
    for _ in range(2000):
        account.pay_in(10.0)
    assert account.has_credit(500.0, are_new=are_new)
    assert not account.has_credit(4001.0, are_new=are_new)
    account.pay_in(0.1)
    assert account.has_credit(500.0, are_new=are_new), "one short round is no change"
    for _ in range(60):
        account.pay_in(0.1)
    assert not account.has_credit(41.0, are_new=are_new)
    assert account.has_credit(1.0, are_new=are_new)
