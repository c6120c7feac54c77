"""How live steps differ from their profile: what the machine does, apart from the profile's flaws.

    COMPUTE       how slow the machine computes now: all of a step but reading K/V
    READ          how slow it reads K/V now. Both move from round to round, and mostly together.
    EXTRA_ROWS    what drafted rows add to a verify pass, beyond that: a flaw, and steady
    PREFILL       prompts' chunks, and draft:... a drafter's steps: likewise

A step shows a sum of these alone. A slower machine and a flaw look the same in one kind of round,
and so do slow cores and slow memory at one context; a Kalman filter over the logarithms keeps what
is still undecided as covariance, so that another round settles it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from magicdec.acceptance.prior import Floats

COMPUTE, READ = "compute", "read"
EXTRA_ROWS = "verify:rows"
MAX_ABSURDITY = 100.0  # a measured time further than this factor from the prediction is an error

# Seconds as profiled, and the kinds whose factors they are multiplied with.
Part = tuple[float, tuple[str, ...]]

# Standard deviations of logarithms.
_NOISE = 0.1  # of one measured step, and a shorter one's is larger:
_JITTER = 0.002  # seconds that any step may take more or less
_PRIOR_SPREAD = 0.3  # of a profile's flaws, and of a machine's speed since
_SPEED_STEP = 0.025  # by which the machine moves in a round,
_APART_STEP = 0.01  # and COMPUTE and READ each for itself
_FLAW_STEP = 0.005  # by which a flaw does, as contexts grow
_OTHER_LOAD = 0.1  # what all of them gain where the batch is another one
_ODD = 2.0  # beyond so many, a slow time alone is a stall, and two in a row are a change
_SPEEDS = slice(0, 2)


class StepCorrections:
    """Factors beside the profile's seconds; 1 until something is observed.

    Times that are not finite and positive, or absurdly far from the profile, are counted in
    `num_dropped` and change nothing else.
    """

    def __init__(self, flaws: Sequence[str]) -> None:
        """Beside COMPUTE and READ."""
        self.num_dropped = 0
        self._index = {kind: i for i, kind in enumerate((COMPUTE, READ, *flaws))}
        self._logs: Floats = np.zeros(len(self._index))
        self._covariance: Floats = np.eye(len(self._index)) * _PRIOR_SPREAD**2
        self._steps = np.full(len(self._index), _FLAW_STEP**2)
        self._steps[_SPEEDS] = _APART_STEP**2
        self._observed: set[str] = set()
        self._odd: dict[str, bool] = {}  # steps whose last time was odd: too slow or too fast

    @property
    def factors(self) -> dict[str, float]:
        return {kind: self.factor(kind) for kind in self._index}

    @property
    def observed_factors(self) -> dict[str, float]:
        """Of the kinds that were observed here."""
        return {kind: self.factor(kind) for kind in self._index if kind in self._observed}

    def factor(self, *kinds: str) -> float:
        """Of all of them together. Raises KeyError for a kind that was not named."""
        return math.exp(sum(self._logs[self._index[kind]] for kind in kinds))

    def begin_at(self, factors: Mapping[str, float]) -> None:
        """What was found elsewhere, for the kinds that nothing was observed of here."""
        for kind, factor in factors.items():
            if kind in self._index and kind not in self._observed:
                self._logs[self._index[kind]] = math.log(factor)

    def expect_another_load(self) -> None:
        """What was learnt of one batch is less sure of another."""
        self._loosen(np.full(len(self._index), _OTHER_LOAD**2), 0.0)

    def pass_round(self) -> None:
        """What was learnt is less sure a round later."""
        self._loosen(self._steps, _SPEED_STEP**2)

    def observe(self, step: str, parts: Sequence[Part], measured_seconds: float) -> None:
        """A step's parts and the time of all of them; `step` names those of its sort."""
        terms = [seconds * self.factor(*kinds) for seconds, kinds in parts]
        predicted = sum(terms)
        usable = 0.0 < predicted < math.inf and 0.0 < measured_seconds < math.inf
        if not usable or not 1.0 / MAX_ABSURDITY <= measured_seconds / predicted <= MAX_ABSURDITY:
            self.num_dropped += 1
            return
        direction = np.zeros(len(self._index))
        for term, (_, kinds) in zip(terms, parts, strict=True):
            if term > 0.0:
                self._observed.update(kinds)
                direction[[self._index[kind] for kind in kinds]] += term / predicted
        surprise = math.log(measured_seconds / predicted)
        noise = _NOISE**2 + (_JITTER / predicted) ** 2
        slow = surprise > 0.0
        if surprise**2 <= _ODD**2 * (float(direction @ self._covariance @ direction) + noise):
            self._odd.pop(step, None)
        elif self._odd.get(step) is slow:
            self._covariance[_SPEEDS, _SPEEDS] += surprise**2  # the machine may well be another
        else:
            self._odd[step] = slow
            if slow:
                return
        towards = self._covariance @ direction
        variance = float(direction @ towards) + noise
        self._logs = self._logs + towards * (surprise / variance)
        self._covariance = self._covariance - np.outer(towards, towards) / variance

    def _loosen(self, variances: Floats, of_both_speeds: float) -> None:
        """Up to what was unknown at the beginning, however long a kind is not seen."""
        known = np.einsum("ii->i", self._covariance)  # its diagonal, to be written to
        known += np.minimum(variances, np.maximum(_PRIOR_SPREAD**2 - known, 0.0))
        room = max(_PRIOR_SPREAD**2 - float(known[_SPEEDS].max()), 0.0)
        self._covariance[_SPEEDS, _SPEEDS] += min(of_both_speeds, room)
