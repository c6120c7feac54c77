"""Trying what is probably worse, to learn: at most a share of the time may be lost by it."""

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
_FREE = 0.2  # of a plain round: losses well below it do not make a trial worth more
_FOR_NEW = 0.5  # of the income is kept for requests that plain decoding has shown nothing of
_WITHHELD = 0.1  # of the income: losses are known only afterwards


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and draft length to try for one round."""

    setting: int
    draft_length: int


class ExplorationAccount:
    """Credit in seconds: a share of every round's time comes in, what trials lose goes out.

    The loss of a round is its time less what its tokens would have taken under the choice that was
    set aside. It must be covered as predicted, and is charged for the tokens that came; a gain is
    not paid in, so that luck buys no further trials. Two purses: one for batches that are new
    while nothing is drafted, where a trial may show that the mix has changed, and one for
    everything else, which would otherwise have spent it all before.
    """

    def __init__(self, share: float) -> None:
        check_at_least("exploration_share", share, 0)
        check_at_most("exploration_share", share, 1)
        self.seconds = 0.0  # of all rounds
        self.seconds_lost = 0.0
        self.num_trials = 0
        self._income = share * (1.0 - _WITHHELD)
        self._credit = {True: 0.0, False: 0.0}  # for requests that are new, and else

    def pick(
        self,
        forecast: Forecast,
        hopeful_tokens: Floats,  # Forecast.tokens' shape
        chosen: Candidate,  # what would be set aside
        margin: float,  # by which another must be better to be chosen
        allowed: Sequence[bool],  # [num_settings]
        *,
        are_new: bool,
    ) -> Trial | None:
        """The trial of the most hope a second lost, if one may pay and is affordable.

        Even hopeful tokens are fewer than if every draft were accepted, so what could not pay then
        is never tried. Draft length 0 needs no trial, nor do positions that the choice shows.
        """
        seconds, plain = forecast.seconds, float(forecast.seconds[0, 0])
        losses = np.maximum(seconds - forecast.tokens / chosen.rate, _LEAST_LOSS * plain)
        gains = hopeful_tokens / seconds / chosen.rate - 1.0
        credit = self._credit[are_new]
        reach = credit if are_new else max(credit, _MAX_SAVED_ROUNDS * plain)
        possible = (gains > margin) & (losses <= reach)
        possible[:, 0] = False
        possible[~np.array(allowed)] = False
        possible[chosen.setting, : chosen.draft_length + 1] = False
        if not possible.any():
            return None
        worth = np.where(possible, gains / (losses + _FREE * plain), 0.0)
        setting, length = np.unravel_index(int(np.argmax(worth)), worth.shape)
        if losses[setting, length] > credit:
            return None  # what is worth most is saved for, or cheap trials would eat all
        return Trial(int(setting), int(length))

    def has_credit(self, plain_seconds: float, *, are_new: bool) -> bool:
        """Whether the cheapest trial could be paid."""
        return self._credit[are_new] > _LEAST_LOSS * plain_seconds

    def pay_in(self, seconds: float) -> None:
        """The time of a round, whatever it was."""
        self.seconds += seconds
        for are_new, share in ((True, _FOR_NEW), (False, 1.0 - _FOR_NEW)):
            credit = self._credit[are_new]
            limit = max(_MAX_SAVED_ROUNDS * seconds, _LAPSE * credit)
            self._credit[are_new] = min(credit + share * self._income * seconds, limit)

    def charge(self, loss: float, *, are_new: bool) -> None:
        """What a trial lost; a gain is not paid in."""
        self.num_trials += 1
        self.seconds_lost += max(loss, 0.0)
        self._credit[are_new] -= max(loss, 0.0)
