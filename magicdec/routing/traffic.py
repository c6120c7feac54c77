"""What finished requests teach: how long answers get, and how fast the queue drains."""

import math

_MEMORY = 200  # answers; older ones fade
_REFRESH = 8  # answers between two workings-out of the means
_RATE_MEMORY_S = 20.0
_LEAST_RATE_S = 1.0
_SIZES = 42  # powers of two up to reports.MAX_TOKENS


class OutputEstimate:
    """The answer expected under a limit of max_tokens, given what there is of it already.

    Answers are kept apart by the size of their limit (powers of two): a client that leaves the
    limit to the server gets short answers under a long one, a client that sets it often uses it
    up. Beside what was seen the limit itself counts as one answer, so the first requests reserve
    all they may use, and soon less.
    """

    def __init__(self) -> None:
        self._by_limit: dict[int, _Answers] = {}

    def expected(self, max_tokens: int, num_output_tokens: int = 0) -> int:
        """Tokens of the whole answer: more than there are, at most the limit."""
        answers = self._by_limit.get(max_tokens.bit_length())
        if answers is None:
            return max_tokens
        count, total = answers.longer_than(num_output_tokens)
        mean = math.ceil((total + max_tokens) / (count + 1.0))
        return min(max(mean, num_output_tokens + 1), max_tokens)

    def learn(self, max_tokens: int, num_output_tokens: int) -> None:
        """One finished answer."""
        limit = max_tokens.bit_length()
        answers = self._by_limit.get(limit)
        if answers is None:
            answers = self._by_limit[limit] = _Answers()
        answers.add(num_output_tokens)


class _Answers:
    """Counts and sums of answers by power of two, fading."""

    def __init__(self) -> None:
        self._counts = [0.0] * _SIZES
        self._sums = [0.0] * _SIZES
        self._tails = [(0.0, 0.0)] * (_SIZES + 1)  # counts and sums of this size and above
        self._num_added = 0

    def add(self, num_tokens: int) -> None:
        fade = 1.0 - 1.0 / _MEMORY
        size = num_tokens.bit_length()
        self._counts = [count * fade for count in self._counts]
        self._sums = [total * fade for total in self._sums]
        self._counts[size] += 1.0
        self._sums[size] += num_tokens
        self._num_added += 1
        if self._num_added <= _REFRESH or self._num_added % _REFRESH == 0:
            self._work_out_tails()

    def longer_than(self, num_tokens: int) -> tuple[float, float]:
        """Count and sum of the answers of at least this size; those of the very size, which may be
        shorter, count in full."""
        return self._tails[num_tokens.bit_length() if num_tokens > 0 else 0]

    def _work_out_tails(self) -> None:
        count = total = 0.0
        for size in range(_SIZES - 1, -1, -1):
            count += self._counts[size]
            total += self._sums[size]
            self._tails[size] = (count, total)


class DrainRate:
    """How fast requests leave the queue and the replicas, and what to tell one that is refused.

    The slower of both counts: sending fills the replicas first, and what they finish may have been
    waiting elsewhere.
    """

    def __init__(self, *, least_s: float, most_s: float, unknown_s: float) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._unknown_s = unknown_s
        self._sent, self._finished = _Rate(), _Rate()

    def sent(self, num_tokens: int, now: float) -> None:
        self._sent.add(num_tokens, now)

    def finished(self, num_tokens: int, now: float) -> None:
        self._finished.add(num_tokens, now)

    def tokens_per_s(self, now: float) -> float | None:
        """None before anything was measured."""
        rates = (self._sent.per_second(now), self._finished.per_second(now))
        return min((rate for rate in rates if rate is not None), default=None)

    def retry_after_s(self, num_waiting_tokens: int, now: float) -> float:
        """When what waits now will have been sent."""
        rate = self.tokens_per_s(now)
        if rate is None:
            return self._unknown_s
        if rate * self._most_s <= num_waiting_tokens:
            return self._most_s
        return max(num_waiting_tokens / rate, self._least_s)


class _Rate:
    """Tokens a second, over about the last _RATE_MEMORY_S seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at: float | None = None

    def add(self, num_tokens: int, now: float) -> None:
        self._fade(now)
        self._tokens += num_tokens

    def per_second(self, now: float) -> float | None:
        """None before the first tokens, or while they are too recent to make a rate."""
        if self._at is None:
            return None
        self._fade(now)
        return self._tokens / self._seconds if self._seconds >= _LEAST_RATE_S else None

    def _fade(self, now: float) -> None:
        """Tokens and the seconds they were counted over fade alike, so their quotient is a mean."""
        if self._at is None:
            self._at = now
        fade = math.exp(-max(now - self._at, 0.0) / _RATE_MEMORY_S)
        self._tokens *= fade
        self._seconds = self._seconds * fade + _RATE_MEMORY_S * (1.0 - fade)
        self._at = now
