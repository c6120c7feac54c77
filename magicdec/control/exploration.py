"""Trying what is probably worse, to learn: at most a share of the time may be lost by it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magicdec.acceptance.prior import Floats
from magicdec.config import check_at_least, check_at_most
from magicdec.control.request_lengths import Candidate
from magicdec.control.round_forecast import Forecast

_MAX_SAVED_ROUNDS = 4.0  # credit beyond so many rounds lapses: no burst after a quiet day
_LAPSE = 0.9  # of it is left a round later: long rounds do not pay for trials in short ones
_LEAST_LOSS = 0.01  # of a plain round: what looks free is charged that
_CHEAP = 0.25  # of the credit: what so little buys is tried while something dearer is saved for
_FREE = 0.2  # of a plain round: losses well below it do not make a trial worth more
_ENOUGH_FOR_UNSEEN = 1.0  # of a round; what comes in beyond that is for everything else
_FOR_UNSEEN = 0.5  # of the income is kept for what the choice shows nothing of
_WITHHELD = 0.1  # of the income: losses are known only afterwards
# Standard deviation of the logarithm of what a plain round takes, when drafted ones alone show it:
# after one of them; it grows as the root of their number, to what a profile and a machine may hide.
_PLAIN_DOUBT = 0.05
_CONFIRMED_DOUBT = 0.02  # the same where the last plain round took what was foreseen
_CONFIRMED = 1.15  # times that, or a part of it, at most
_MOST_PLAIN_DOUBT = 0.4


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and draft length to try for one round."""

    setting: int
    draft_length: int
    of_unseen: bool  # of what the choice shows nothing of: which purse pays


class ExplorationAccount:
    """Credit in seconds: a share of every round's time comes in, what trials lose goes out.

    The loss of a round is its time less what its tokens would have taken under the choice that was
    set aside. It must be covered as predicted, and is charged for the tokens that came; a gain is
    not paid in, so that luck buys no further trials. Two purses: one for what the choice shows
    nothing of, which are drafts for requests that are new while nothing is drafted, and plain
    decoding while something is; and one for everything else, which would otherwise have spent it
    all before. What the first holds beyond a round flows into the second: text may become foreseen
    while nothing is drafted.
    """

    def __init__(self, share: float) -> None:
        check_at_least("exploration_share", share, 0)
        check_at_most("exploration_share", share, 1)
        self.seconds = 0.0  # of all rounds
        self.seconds_lost = 0.0
        self.num_trials = 0
        self._income = share * (1.0 - _WITHHELD)
        self._credit = {True: 0.0, False: 0.0}  # for what is unseen, and else
        self._num_rounds_without_plain = 0
        self._plain_doubt = _PLAIN_DOUBT

    def pick_plain(self, forecast: Forecast, chosen: Candidate) -> Trial | None:
        """A plain round, where only drafted ones say what it takes and it may well be faster.

        Drafted rounds that take long look like a slow machine, on which plain ones would be slow.
        """
        doubt = self._plain_doubt * math.sqrt(self._num_rounds_without_plain)
        doubt = min(doubt, _MOST_PLAIN_DOUBT)
        rate, seconds = float(forecast.rates[0, 0]), float(forecast.seconds[0, 0])
        may_pay = chosen.draft_length > 0 and rate * math.exp(doubt) > chosen.rate
        loss = max(1.0 - rate / chosen.rate, _LEAST_LOSS) * seconds
        affordable = loss <= self._credit[True]
        return Trial(chosen.setting, 0, of_unseen=True) if may_pay and affordable else None

    def pick(
        self,
        forecast: Forecast,
        hopeful_tokens: Floats,  # Forecast.tokens' shape
        chosen: Candidate,  # what would be set aside
        margin: float,  # by which another must be better to be chosen
        allowed: Sequence[bool],  # [num_settings]
        *,
        of_unseen: bool,
    ) -> Trial | None:
        """The trial of the most hope a second lost, if one may pay and is affordable.

        Even hopeful tokens are fewer than if every draft were accepted, so what could not pay then
        is never tried. Positions that the choice shows need no trial; for draft length 0 see
        pick_plain.
        """
        seconds, plain = forecast.seconds, float(forecast.seconds[0, 0])
        losses = np.maximum(seconds - forecast.tokens / chosen.rate, _LEAST_LOSS * plain)
        gains = hopeful_tokens / seconds / chosen.rate - 1.0
        credit = self._credit[of_unseen]
        reach = credit if of_unseen else max(credit, _MAX_SAVED_ROUNDS * plain)
        possible = (gains > margin) & (losses <= reach)
        possible[:, 0] = False
        possible[~np.array(allowed)] = False
        possible[chosen.setting, : chosen.draft_length + 1] = False
        if not possible.any():
            return None
        worth = np.where(possible, gains / (losses + _FREE * plain), 0.0)
        setting, length = np.unravel_index(int(np.argmax(worth)), worth.shape)
        if losses[setting, length] > credit:
            # What is worth most is saved for, or cheap trials would eat all; one that leaves most
            # of the savings need not wait for it.
            worth[losses > _CHEAP * credit] = 0.0
            setting, length = np.unravel_index(int(np.argmax(worth)), worth.shape)
        if worth[setting, length] <= 0.0:
            return None
        return Trial(int(setting), int(length), of_unseen=of_unseen)

    def has_credit(self, plain_seconds: float, *, of_unseen: bool) -> bool:
        """Whether the cheapest trial could be paid."""
        return self._credit[of_unseen] > _LEAST_LOSS * plain_seconds

    def pay_in(self, seconds: float, foreseen: float, *, is_plain: bool) -> None:
        """The time of a round, whatever it was, and what it was foreseen to take."""
        self.seconds += seconds
        self._num_rounds_without_plain = 0 if is_plain else self._num_rounds_without_plain + 1
        if is_plain:
            confirmed = foreseen / _CONFIRMED <= seconds <= foreseen * _CONFIRMED
            self._plain_doubt = _CONFIRMED_DOUBT if confirmed else _PLAIN_DOUBT
        income = self._income * seconds
        unseen = self._credit[True] + _FOR_UNSEEN * income
        enough = max(_ENOUGH_FOR_UNSEEN * seconds, _LAPSE * self._credit[True])
        self._credit[True] = min(unseen, enough)
        other = self._credit[False] + (1.0 - _FOR_UNSEEN) * income + max(unseen - enough, 0.0)
        limit = max(_MAX_SAVED_ROUNDS * seconds, _LAPSE * self._credit[False])
        self._credit[False] = min(other, limit)

    def charge(self, loss: float, *, of_unseen: bool) -> None:
        """What a trial lost; a gain is not paid in."""
        self.num_trials += 1
        self.seconds_lost += max(loss, 0.0)
        self._credit[of_unseen] -= max(loss, 0.0)
