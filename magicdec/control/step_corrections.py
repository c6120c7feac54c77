"""How live steps differ from their profile: what the machine does, apart from the profile's flaws.

    VERIFY        how slow the machine is now. It moves from round to round, and all steps with it.
    EXTRA_ROWS    what drafted rows add to a verify pass, beyond that: a flaw, and steady.
    draft:...     a drafter's steps, beyond that: likewise.

Rounds that draft show sums of these alone. A slower machine and a flaw look the same there, until a
plain round tells them apart; a Kalman filter over the logarithms keeps what is still undecided as
covariance, so that the plain round settles the flaws too.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from magicdec.acceptance.prior import Floats
from magicdec.control.cost_correction import MAX_ABSURDITY
from magicdec.cost_model import VERIFY

EXTRA_ROWS = "verify:rows"

# Standard deviations of logarithms.
_NOISE = 0.1  # of one measured step, and a shorter one's is larger:
_JITTER = 0.002  # seconds that any step may take more or less
_PRIOR_SPREAD = 0.3  # of a profile's flaws, and of a machine's speed since
_SPEED_STEP = 0.03  # by which the machine's speed moves in a round
_FLAW_STEP = 0.005  # by which a flaw does, as contexts grow
_OTHER_LOAD = 0.1  # what all of them gain where the batch is another one
_ODD = 2.0  # beyond so many, a time alone is a stall, and two in a row are a change


class StepCorrections:
    """Factors beside the profile's seconds; 1 until something is observed.

    Times that are not finite and positive, or absurdly far from the profile, are counted in
    `num_dropped` and change nothing else.
    """

    def __init__(self, draft_kinds: Sequence[str]) -> None:
        self.num_dropped = 0
        self._index = {kind: i for i, kind in enumerate((VERIFY, EXTRA_ROWS, *draft_kinds))}
        self._logs: Floats = np.zeros(len(self._index))
        self._covariance: Floats = np.eye(len(self._index)) * _PRIOR_SPREAD**2
        self._steps = np.full(len(self._index), _FLAW_STEP**2)
        self._steps[0] = _SPEED_STEP**2
        self._observed: set[str] = set()
        self._odd: dict[str, bool] = {}  # kinds whose last time was odd: too slow or too fast

    @property
    def factors(self) -> dict[str, float]:
        return {kind: self.factor(kind) for kind in self._index}

    @property
    def observed_factors(self) -> dict[str, float]:
        """Of the kinds that were observed here."""
        return {kind: self.factor(kind) for kind in self._index if kind in self._observed}

    def factor(self, kind: str) -> float:
        """Raises KeyError for a kind that was not named."""
        return math.exp(self._logs[self._index[kind]])

    def begin_at(self, factors: Mapping[str, float]) -> None:
        """What was found elsewhere, for the kinds that nothing was observed of here."""
        for kind, factor in factors.items():
            if kind in self._index and kind not in self._observed:
                self._logs[self._index[kind]] = math.log(factor)

    def expect_another_load(self) -> None:
        """What was learnt of one batch is less sure of another."""
        self._loosen(np.full(len(self._index), _OTHER_LOAD**2))

    def observe_forward(
        self, plain_seconds: float, extra_seconds: float, measured_seconds: float
    ) -> None:
        """A verify pass: what the profile says of one row a sequence, and of the rows beyond."""
        self._loosen(self._steps)
        extra = self.factor(EXTRA_ROWS) * extra_seconds
        predicted = plain_seconds + extra
        direction = np.zeros(len(self._index))
        direction[0] = 1.0
        direction[1] = extra / predicted if predicted > 0.0 else 0.0
        kinds = (VERIFY,) if extra_seconds == 0.0 else (VERIFY, EXTRA_ROWS)
        self._observe(kinds, direction, predicted, measured_seconds)

    def observe_drafts(self, kind: str, predicted_seconds: float, measured_seconds: float) -> None:
        """All draft steps of a round, and what the profile says of them."""
        direction = np.zeros(len(self._index))
        direction[[0, self._index[kind]]] = 1.0
        predicted = self.factor(kind) * predicted_seconds
        self._observe((kind,), direction, predicted, measured_seconds)

    def _loosen(self, variances: Floats) -> None:
        """Up to what was unknown at the beginning, however long a kind is not seen."""
        room = np.maximum(_PRIOR_SPREAD**2 - np.diag(self._covariance), 0.0)
        self._covariance = self._covariance + np.diag(np.minimum(variances, room))

    def _observe(
        self, kinds: tuple[str, ...], direction: Floats, predicted: float, measured: float
    ) -> None:
        """`predicted` without the machine's speed."""
        usable = 0.0 < predicted < math.inf and 0.0 < measured < math.inf
        if not usable or not 1.0 / MAX_ABSURDITY <= measured / predicted <= MAX_ABSURDITY:
            self.num_dropped += 1
            return
        self._observed.update(kinds)
        surprise = math.log(measured / predicted) - float(self._logs[0])
        noise = _NOISE**2 + (_JITTER / predicted) ** 2
        if surprise**2 <= _ODD**2 * (float(direction @ self._covariance @ direction) + noise):
            self._odd.pop(kinds[-1], None)
        elif self._odd.get(kinds[-1]) is (surprise > 0.0):
            self._covariance[0, 0] += surprise**2  # the machine's speed may well be another one
        else:
            self._odd[kinds[-1]] = surprise > 0.0
            return
        towards = self._covariance @ direction
        variance = float(direction @ towards) + noise
        self._logs = self._logs + towards * (surprise / variance)
        self._covariance = self._covariance - np.outer(towards, towards) / variance
