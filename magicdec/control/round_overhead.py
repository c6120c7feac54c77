"""What a round takes beside its forwards: scheduling, choosing, learning, emitting."""

_RATE = 0.1  # of a new time in the mean
_MOST = 1.0  # seconds: something else held the process up


class RoundOverhead:
    """Of plain rounds and of drafted ones, which are chosen anew and learnt from more often.

    What was not seen yet is taken to be as the other.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}  # by whether the round was drafted

    def seconds(self, *, drafted: bool) -> float:
        return self._seconds.get(drafted, self._seconds.get(not drafted, 0.0))

    def observe(self, seconds: float, *, drafted: bool) -> None:
        """One round's. A time that cannot be moves nothing."""
        if 0.0 <= seconds < _MOST:
            before = self.seconds(drafted=drafted)
            self._seconds[drafted] = before + _RATE * (seconds - before)
