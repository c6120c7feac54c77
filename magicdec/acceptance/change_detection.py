"""Whether drafts are still accepted as predicted: cumulative sums of log-likelihood ratios."""

import numpy as np

from magicdec.acceptance.prior import Floats

_SHIFT = 1.5  # log-odds by which a change is supposed to move every hazard
_ROW_LIMIT = 2.5  # one row's say in a round: a single odd request is not a change
_THRESHOLD = 6.0


def likelihood_gains(
    predicted: Floats, examined: Floats, accepted: Floats, known: Floats
) -> Floats:
    """Log of how much more likely each row's round is after a change upwards, and downwards.

    Returns [2, num_rows]; all arguments are [num_rows, num_positions]. `known` is the say of a
    prediction, 0..1: where it was a guess, being wrong is no change.
    """
    gains = []
    for shift in (_SHIFT, -_SHIFT):
        miss = -np.log(1.0 - predicted + predicted * np.exp(shift))  # log((1 - p1) / (1 - p0))
        gains.append((known * (examined * miss + accepted * shift)).sum(axis=1))
    return np.array(gains)


class ChangeDetector:
    """Page's CUSUM of all rows together, upwards and downwards.

    With exact predictions, an alarm in either direction comes at most once in e^6 examined drafts
    on average (Lorden's bound), in practice far less often.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(2)

    def observe(self, gains: Floats) -> bool:
        """One round's likelihood_gains. True at a change; the sums begin anew."""
        total = np.clip(gains, -_ROW_LIMIT, _ROW_LIMIT).sum(axis=1)
        self._sums = np.maximum(self._sums + total, 0.0)
        if self._sums.max() < _THRESHOLD:
            return False
        self._sums[:] = 0.0
        return True
