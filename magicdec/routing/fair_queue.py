"""The requests that wait for a replica: whose turn it is, and which of theirs may go.

Fair between API keys by the tokens they were served: the next turn is the least served key's
(virtual token counters; Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Not
deficit round robin, which must know a request's cost before it is served: of an answer's length
there is only an estimate, and a counter can be set right when the answer has ended. It needs no
quantum either, and gives the same bound: while two keys always have a request that fits, what they
were served differs by no more than the slack and the largest request.

Within a key the oldest goes first, or a newer one of another length class where the oldest does
not fit yet. After an age bound the oldest of a key is the first whatever its class.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from magicdec.routing.ranking import Ranking
from magicdec.routing.waiting import Waiting

_MAX_KEYS_LOOKED_AT = 64  # in one turn, so that no number of waiting keys makes a decision slow


# Of one length class, and not to go to these replicas: then what keeps the first of them back keeps
# the others back too.
_Alike = tuple[int, tuple[str, ...]]


@dataclass(slots=True)
class _Key:
    """`requests` in order of arrival; `alike` holds heaps in order of the age bound."""

    requests: dict[str, Waiting] = field(default_factory=dict)
    alike: dict[_Alike, list[tuple[float, int, Waiting]]] = field(default_factory=dict)


class FairQueue:
    """Knows no replica and no clock. `slack_tokens`: how far company may run ahead of its turn."""

    def __init__(self, slack_tokens: int) -> None:
        self._slack = slack_tokens
        self._requests: dict[str, Waiting] = {}
        self._keys: dict[str, _Key] = {}
        self._served: dict[str, int] = {}  # tokens, level included
        self._level = 0  # what a key that comes new counts as served with
        self._turns = Ranking()  # of the keys that wait, by tokens served
        self._sizes = Ranking()  # the same, by number of requests
        self._class_tokens: defaultdict[int, int] = defaultdict(int)
        self._class_counts: Counter[int] = Counter()
        self._num_added = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Waiting]:
        """In the order in which they were added."""
        return iter(list(self._requests.values()))

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def num_known_keys(self) -> int:
        """Those that wait, and those whose service still counts."""
        return len(self._served)

    def add(self, waiting: Waiting) -> None:
        """A key that had nothing waiting starts level with the others: idle time saves nothing up.

        Raises ValueError for an id that waits already.
        """
        if waiting.request_id in self._requests:
            raise ValueError(f"request {waiting.request_id} waits already")
        name = waiting.key
        if name not in self._keys:
            self._keys[name] = _Key()
            self._served[name] = max(self._served.get(name, 0), self._level)
        key = self._keys[name]
        self._num_added += 1
        self._requests[waiting.request_id] = key.requests[waiting.request_id] = waiting
        heap = key.alike.setdefault((waiting.length_class, waiting.exclude), [])
        heapq.heappush(heap, (waiting.first_at, self._num_added, waiting))
        self.num_tokens += waiting.num_tokens
        self._class_tokens[waiting.length_class] += waiting.num_context_tokens
        self._class_counts[waiting.length_class] += 1
        self._rank(name)

    def remove(self, request_id: str) -> Waiting:
        """Takes it out, served or not. Raises KeyError for an id that does not wait."""
        waiting = self._requests.pop(request_id)
        waiting.queued = False
        self.num_tokens -= waiting.num_tokens
        self._class_tokens[waiting.length_class] -= waiting.num_context_tokens
        self._class_counts[waiting.length_class] -= 1
        key = self._keys[waiting.key]
        del key.requests[request_id]
        if not key.requests:
            del self._keys[waiting.key]
        self._rank(waiting.key)
        return waiting

    def charge(self, key: str, num_tokens: int) -> None:
        """Counts tokens as served; fewer than none sets an estimate right. A key that is no longer
        known has nothing to set right: it would start level anyway."""
        if key in self._served:
            self._served[key] += num_tokens
            self._rank(key)

    def lag(self, key: str) -> int:
        """Tokens by which a waiting key is behind the one served most."""
        return int(self._turns.greatest()) - self._served[key]

    def class_tokens(self, length: int) -> int:
        """Context tokens that wait in a length class."""
        return self._class_tokens[length]

    @property
    def num_by_class(self) -> dict[int, int]:
        """Requests that wait, by the length classes there are of them."""
        return {length: count for length, count in self._class_counts.items() if count > 0}

    def turns(self) -> list[str]:
        """The keys that wait, least served first; of very many, the first ones."""
        return [key for _, key in zip(range(_MAX_KEYS_LOOKED_AT), self._turns, strict=False)]

    def offers(self, key: str) -> list[Waiting]:
        """What a key may send: the first of each length class (and `exclude`), by age bound."""
        heads = [head for alike in list(self._keys[key].alike) if (head := self._head(key, alike))]
        return sorted(heads, key=lambda waiting: waiting.first_at)

    def company(self, length: int, now: float) -> Iterator[Waiting]:
        """Of one length class, who may start together with the request just served.

        Whoever is yielded must be removed and charged, or it is skipped. No key gets more than the
        slack ahead of the least served, and none lets a younger request pass one of its own that is
        beyond the age bound.
        """
        skipped: set[str] = set()
        while self._turns and (found := self._next_of(length, now, skipped)) is not None:
            yield found
            if found.queued:
                skipped.add(found.key)

    def victim(self) -> Waiting | None:
        """Who has to leave a queue that is too long: the newest of the key with the most requests.
        A resumed request stays: its client has a part of the answer."""
        if not self._sizes:
            return None
        newest = reversed(self._keys[self._sizes.last()].requests.values())
        return next((w for w in newest if not w.resumed), None) or next(
            (w for w in reversed(self._requests.values()) if not w.resumed), None
        )

    def _next_of(self, length: int, now: float, skipped: set[str]) -> Waiting | None:
        limit = self._turns.least() + self._slack
        for key in self.turns():
            if self._served[key] > limit:
                break
            offers = [] if key in skipped else self.offers(key)
            if offers and offers[0].first_at <= now:
                offers = offers[:1]  # nobody of its key passes it
            if found := next((w for w in offers if w.length_class == length), None):
                return found
        return None

    def _head(self, key: str, alike: _Alike) -> Waiting | None:
        heap = self._keys[key].alike[alike]
        while heap and not heap[0][2].queued:
            heapq.heappop(heap)
        if not heap:
            del self._keys[key].alike[alike]
            return None
        return heap[0][2]

    def _rank(self, name: str) -> None:
        key = self._keys.get(name)
        if key is None:
            self._turns.discard(name)
            self._sizes.discard(name)
        else:
            self._turns.put(name, self._served[name])
            self._sizes.put(name, len(key.requests))
        if self._turns:
            self._level = max(self._level, int(self._turns.least()))
        elif name in self._served:
            self._level = max(self._level, self._served[name])
        if len(self._served) > 2 * len(self._keys) + _MAX_KEYS_LOOKED_AT:
            self._forget_level_keys()

    def _forget_level_keys(self) -> None:
        """Drops the counts of keys that would start level anyway."""
        self._served = {
            key: served
            for key, served in self._served.items()
            if key in self._keys or served > self._level
        }
