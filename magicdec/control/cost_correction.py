"""How live step times differ from what the cost model says."""

import math
import statistics
from collections import deque

MAX_ABSURDITY = 100.0  # a measured time further than this factor from the prediction is an error


class CostCorrection:
    """How much slower one kind of step is now than its StepCost says: a factor to multiply with.

    It follows the median of the last times over their predictions, in log space, so that one odd
    step in `window` does not move it, and a lasting change does within a few rounds. Times that are
    not finite and positive, or absurdly far from the prediction, are counted in `num_dropped` and
    change nothing else.
    """

    def __init__(self, rate: float = 0.3, window: int = 5) -> None:
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.num_dropped = 0
        self.num_observed = 0
        self._rate = rate
        self._log_factor = 0.0
        self._recent = deque([0.0] * window, maxlen=window)  # the profile counts as seen before

    @property
    def factor(self) -> float:
        return math.exp(self._log_factor)

    def begin_at(self, factor: float) -> None:
        """What was found elsewhere, until something is observed here."""
        if self.num_observed == 0:
            self._log_factor = math.log(factor)
            self._recent.extend([self._log_factor] * len(self._recent))

    def observe(self, predicted_seconds: float, measured_seconds: float) -> None:
        """One step's prediction without this correction, and the time it took."""
        usable = 0.0 < predicted_seconds < math.inf and 0.0 < measured_seconds < math.inf
        ratio = measured_seconds / predicted_seconds if usable else 0.0
        if not 1.0 / MAX_ABSURDITY <= ratio <= MAX_ABSURDITY:
            self.num_dropped += 1
            return
        self.num_observed += 1
        self._recent.append(math.log(ratio))
        self._log_factor += self._rate * (statistics.median(self._recent) - self._log_factor)
