"""Names in the order of a score that changes often: a sorted list with a dict beside it."""

from bisect import bisect_left, insort
from collections.abc import Iterator


class Ranking:
    """Least score first, equals by name.

    A list, not a heap: a change costs two binary searches and two moves of memory, which at some
    thousand names is a few microseconds, and the order can be walked without being taken apart.
    """

    def __init__(self) -> None:
        self._order: list[tuple[float, str]] = []
        self._scores: dict[str, float] = {}

    def put(self, name: str, score: float) -> None:
        """Adds a name, or moves it. The score must not be NaN."""
        if self._scores.get(name) == score:
            return
        self.discard(name)
        self._scores[name] = score
        insort(self._order, (score, name))

    def discard(self, name: str) -> None:
        score = self._scores.pop(name, None)
        if score is not None:
            del self._order[bisect_left(self._order, (score, name))]

    def least(self) -> float:
        """The first name's score. Raises IndexError where there is none."""
        return self._order[0][0]

    def greatest(self) -> float:
        """The last name's score. Raises IndexError where there is none."""
        return self._order[-1][0]

    def last(self) -> str:
        """The last name. Raises IndexError where there is none."""
        return self._order[-1][1]

    def __iter__(self) -> Iterator[str]:
        """Must be left before the next change."""
        return (name for _, name in self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, name: object) -> bool:
        return name in self._scores
