"""What a round takes beside its forwards: scheduling, choosing, learning, emitting."""

_RATE = 0.1  # of a new time in the mean
_MOST = 1.0  # seconds: something else held the process up


class RoundOverhead:
    """Of plain rounds and of drafted ones, which are chosen anew and learnt from more often.

    What was not seen yet is taken to be as the other.
    """

    def __init__(self) -> None:
        self._plain: float | None = None
        self._drafted: float | None = None

    def seconds(self, *, drafted: bool) -> float:
        own, other = (self._drafted, self._plain) if drafted else (self._plain, self._drafted)
        return own if own is not None else other or 0.0

    def observe(self, seconds: float, *, drafted: bool) -> None:
        """One round's. A time that cannot be moves nothing."""
        if not 0.0 <= seconds < _MOST:
            return
        before = self.seconds(drafted=drafted)
        after = before + _RATE * (seconds - before)
        if drafted:
            self._drafted = after
        else:
            self._plain = after
