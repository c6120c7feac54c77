"""The account of trials: what it holds, and what lapses."""

import numpy as np
import pytest

from magicdec.control.exploration import ExplorationAccount, Trial
from magicdec.control.request_lengths import Candidate
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_forecast import Forecast


@pytest.mark.parametrize("of_unseen", [True, False])
def test_what_long_rounds_paid_in_lapses_among_short_ones(of_unseen: bool) -> None:
    """Credit is asked for in hundredths of a plain round: 5 s, then the 0.4 s of four rounds."""
    account = ExplorationAccount(0.01)
    for _ in range(2000):
        account.pay_in(10.0, 10.0, is_plain=False)
    assert account.has_credit(500.0, of_unseen=of_unseen)
    assert not account.has_credit(4001.0, of_unseen=of_unseen)
    account.pay_in(0.1, 0.1, is_plain=False)
    assert account.has_credit(500.0, of_unseen=of_unseen), "one short round is no change"
    for _ in range(60):
        account.pay_in(0.1, 0.1, is_plain=False)
    assert not account.has_credit(41.0, of_unseen=of_unseen)
    assert account.has_credit(1.0, of_unseen=of_unseen)


def test_what_new_requests_need_no_more_of_pays_for_other_trials() -> None:
    """Their half of 0.9 % of 600 rounds is 2.7 rounds, of which they keep one."""
    account = ExplorationAccount(0.01)
    for _ in range(600):
        account.pay_in(1.0, 1.0, is_plain=True)
    assert account.has_credit(99.0, of_unseen=True)
    assert not account.has_credit(101.0, of_unseen=True)
    assert account.has_credit(399.0, of_unseen=False)


def is_plain_tried(account: ExplorationAccount, gain: float, draft_length: int = 1) -> bool:
    """Where plain rounds are foreseen to take a second, and the choice to be `gain` times as
    fast."""
    seconds = np.array([[1.0, 1.5]] * 2)
    tokens = np.array([[8.0, 8.0], [8.0, 12.0 * gain]])
    forecast = Forecast(RoundLoad((7000,) * 8), np.empty(0), tokens, seconds, tokens / seconds)
    at = (1, draft_length)
    trial = account.pick_plain(forecast, Candidate(*at, float(tokens[at]), float(seconds[at])))
    assert trial in (None, Trial(1, 0, of_unseen=True)), "under the choice's own drafter"
    return trial is not None


def after(num_drafted: int, plain_seconds: float = 1.3) -> ExplorationAccount:
    """Rounds that drafted, since a plain one that was foreseen to take a second."""
    account = ExplorationAccount(0.01)
    account.pay_in(plain_seconds, 1.0, is_plain=True)
    for _ in range(num_drafted):
        account.pay_in(1.5, 1.5, is_plain=False)
    return account


def test_plain_decoding_is_tried_where_drafted_rounds_alone_say_that_it_is_slower() -> None:
    assert not is_plain_tried(after(2), 1.2), "it was seen just now"
    assert is_plain_tried(after(60), 1.2)
    seen = after(60)
    seen.pay_in(1.0, 1.0, is_plain=True)
    assert not is_plain_tried(seen, 1.2)
    assert not is_plain_tried(after(60), 1.0, draft_length=0), "it is what is chosen"


@pytest.mark.parametrize(("plain_seconds", "wrong"), [(1.1, False), (1.2, True), (0.8, True)])
def test_plain_decoding_is_tried_less_where_it_last_took_what_was_foreseen(
    plain_seconds: float, wrong: bool
) -> None:
    """Its trials would use up what those of drafts for new requests need."""
    assert is_plain_tried(after(60, plain_seconds), 1.2) == wrong
    assert is_plain_tried(after(120, plain_seconds), 1.2)


def test_plain_decoding_is_not_tried_where_no_flaw_of_a_profile_could_make_it_better() -> None:
    assert not is_plain_tried(after(500), 1.6)


def test_a_trial_of_plain_decoding_is_paid_before_the_next_one() -> None:
    account = after(60)
    assert is_plain_tried(account, 1.2)
    account.charge(0.4, of_unseen=True)
    assert not is_plain_tried(account, 1.2)


def test_nothing_is_tried_where_no_time_may_be_lost() -> None:
    account = ExplorationAccount(0.0)
    for _ in range(60):
        account.pay_in(1.5, 1.5, is_plain=False)
    assert not is_plain_tried(account, 1.0)


@pytest.mark.parametrize(
    ("num_rounds", "tried"),
    [(6, None), (14, Trial(0, 1, of_unseen=False)), (200, Trial(1, 1, of_unseen=False))],
)
def test_while_the_best_trial_is_saved_for_one_that_leaves_most_of_it_is_made(
    num_rounds: int, tried: Trial | None
) -> None:
    """Losses of 0.01 and 0.5 s; the dear one promises so much that it is worth more."""
    account = ExplorationAccount(0.01)
    for _ in range(num_rounds):
        account.pay_in(1.0, 1.0, is_plain=True)
    seconds = np.array([[1.0, 1.01], [1.0, 1.5]])
    tokens, hopeful = np.array([[1.0, 1.0]] * 2), np.array([[1.0, 1.1], [1.0, 6.0]])
    forecast = Forecast(RoundLoad((7000,)), np.empty(0), tokens, seconds, tokens / seconds)
    trial = account.pick(
        forecast, hopeful, Candidate(0, 0, 1.0, 1.0), 0.03, [True, True], of_unseen=False
    )
    assert trial == tried
