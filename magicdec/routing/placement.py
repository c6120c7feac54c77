"""Which replica a request goes to, once it may go."""

from collections.abc import Sequence
from dataclasses import dataclass

from magicdec.routing.prefix_affinity import PrefixAffinity
from magicdec.routing.replica import Replica
from magicdec.routing.replica_table import ReplicaTable
from magicdec.routing.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Place:
    """Where, and how much of the prompt is probably cached there."""

    replica: Replica
    num_cached_tokens: int


class Placement:
    """Where the prompt's beginning is cached; else among requests of its length; else where least
    is to be done.

    The first two count as reasons up to the overload limit: the load of the chosen replica with
    this request is at most `overload_factor` times what the least busy one's would be with it.
    With the request in both, an idle replica does not make every other one overloaded, and what a
    cache saves counts for the replica that has it. None for `affinity`: prompts are not compared.
    """

    def __init__(
        self,
        table: ReplicaTable,
        affinity: PrefixAffinity | None,
        *,
        length_classes: bool,
        overload_factor: float,
    ) -> None:
        self._table = table
        self._affinity = affinity
        self._length_classes = length_classes
        self._overload_factor = overload_factor
        # Sizes that found no room, in KV tokens and in tokens of prefill: none larger finds any.
        self._no_room: list[tuple[int, int]] = []

    def look_anew(self) -> None:
        """Something may have made room. Between two calls of it rooms only shrink."""
        self._no_room = []

    def choose(self, request: Waiting) -> Place | None:
        """None: there is room for it nowhere."""
        if not self._table.may_fit(request.num_tokens):
            return None
        least = next(self._table.ranked(request.request_id, request.exclude), None)
        if least is None:
            return None
        limit = self._overload_factor * _load_with(least, request, 0)
        place = self._at_home(request, limit)
        if place is not None:
            return place
        if self._length_classes and not least.is_idle:
            replica = self._among_equals(request, limit)
            if replica is not None:
                return Place(replica, 0)
        replica = self._anywhere(request)
        if replica is None:
            return None
        return Place(replica, self.cached(replica, request.prefix_hashes))

    def cached(self, replica: Replica, hashes: Sequence[int]) -> int:
        """Tokens of a prompt that the replica has probably cached."""
        if self._affinity is None:
            return 0
        total = replica.total_kv_tokens
        return self._affinity.num_cached_tokens(replica.replica_id, hashes, total)

    def has_other_home(self, request: Waiting, replica: Replica) -> bool:
        """Whether the prompt's beginning is cached, and not here."""
        if self._affinity is None:
            return False
        homes = self._affinity.homes(request.prefix_hashes)
        return bool(homes) and replica.replica_id not in homes

    def _anywhere(self, request: Waiting) -> Replica | None:
        size = request.num_tokens, request.num_context_tokens
        special = request.exclude or request.request_id in self._table.reserved.values()
        if not special and any(size[0] >= kv and size[1] >= new for kv, new in self._no_room):
            return None
        found = self._table.least_busy(request.request_id, *size, request.exclude)
        if found is None and not special:
            self._no_room.append(size)
        return found

    def _at_home(self, request: Waiting, limit: float) -> Place | None:
        """The least busy of the replicas that have a part of the prompt, within the limit."""
        if self._affinity is None:
            return None
        best: Place | None = None
        least = limit
        for replica_id in self._affinity.homes(request.prefix_hashes):
            replica = self._table.usable(replica_id, request.request_id, request.exclude)
            if replica is None:
                continue
            cached = self.cached(replica, request.prefix_hashes)
            load = _load_with(replica, request, cached)
            fits = replica.fits(request.num_tokens, request.num_context_tokens - cached)
            if cached and fits and load <= least:
                best, least = Place(replica, cached), load
        return best

    def _among_equals(self, request: Waiting, limit: float) -> Replica | None:
        length = request.length_class
        candidates = self._table.ranked(request.request_id, request.exclude, length)
        replica = next(candidates, None)
        if replica is None or _load_with(replica, request, 0) > limit:
            return None
        fits = replica.fits(request.num_tokens, request.num_context_tokens)
        return replica if fits else None


def _load_with(replica: Replica, request: Waiting, num_cached_tokens: int) -> float:
    new = request.num_context_tokens - num_cached_tokens
    return replica.load_with(request.num_tokens, new)
