"""The replicas that are known, and in what order they come for the next request."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from magicdec.routing.ranking import Ranking
from magicdec.routing.replica import Debit, Replica
from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport
from magicdec.routing.traffic import OutputEstimate

_MAX_LOOKED_AT = 32  # replicas, in one search for room

Ended = list[tuple[Debit, FinishedRequest | None]]


class ReplicaTable:
    """A replica is live while its last report is younger than `report_timeout_s`. One that a caller
    reported dead is ignored for as long, so that a late report of a dead replica does not revive it
    while a wrong accusation does not exclude a healthy one for ever.

    Rankings hold the replicas with room for something; nothing here walks all replicas except a
    reservation and a death, which are rare.
    """

    def __init__(
        self, outputs: OutputEstimate, *, report_timeout_s: float, debit_timeout_s: float
    ) -> None:
        self._outputs = outputs
        self._report_timeout_s = report_timeout_s
        self._debit_timeout_s = debit_timeout_s
        self._replicas: OrderedDict[str, Replica] = OrderedDict()  # least recently heard of first
        self._dead_since: dict[str, float] = {}
        self._sent_to: dict[str, str] = {}  # request -> replica, of all debits
        self._resting: dict[str, float] = {}  # replica -> until when
        self._by_load = Ranking()
        self._by_room = Ranking()  # most free tokens first
        self._by_prefill_room = Ranking()  # most first
        self._by_class: dict[int, Ranking] = {}
        self._class_of: dict[str, int] = {}  # where _by_class has it
        self._idle: set[str] = set()
        self.reserved: dict[str, str] = {}  # replica -> the request that it is kept for
        self.max_batch_tokens = 1  # what one step computes, by the latest report

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> Replica | None:
        return self._replicas.get(replica_id)

    def sent_to(self, request_id: str) -> str | None:
        """Where a request was sent that has not ended, as far as is known."""
        return self._sent_to.get(request_id)

    def report(self, replica_id: str, report: ReplicaReport, now: float) -> Ended | None:
        """Takes a report; None where it is ignored: the replica counts as dead, or it is late."""
        if replica_id in self._dead_since:
            return None
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = self._replicas[replica_id] = Replica(replica_id, report, now)
        elif report.number < replica.report.number:
            return None
        self._replicas.move_to_end(replica_id)
        self.max_batch_tokens = report.max_batch_tokens
        self._find_strays(replica_id, report, now)
        ended = replica.update(report, now, self._growth, self._debit_timeout_s)
        for debit, _ in ended:
            self._sent_to.pop(debit.request_id, None)
        self._rank(replica, now)
        return ended

    def send(self, replica: Replica, debit: Debit, length_class: int) -> None:
        replica.send(debit, length_class)
        self._sent_to[debit.request_id] = replica.replica_id
        self._rank(replica, debit.at)

    def mark_dead(self, replica_id: str, now: float) -> None:
        self._dead_since[replica_id] = now
        self._drop(replica_id)

    def expire(self, now: float) -> None:
        """Drops the replicas that were not heard of, and ends rests and accusations."""
        limit = self._report_timeout_s
        while self._replicas:
            oldest = next(iter(self._replicas.values()))
            if now - oldest.reported_at < limit:
                break
            self._drop(oldest.replica_id)
        if self._dead_since:
            self._dead_since = {k: t for k, t in self._dead_since.items() if now - t < limit}
        if not self._resting:
            return
        for replica_id in [name for name, until in self._resting.items() if until <= now]:
            del self._resting[replica_id]
            if replica_id in self._replicas:
                self._rank(self._replicas[replica_id], now)

    @property
    def has_room(self) -> bool:
        return len(self._by_load) > 0

    def may_fit(self, num_tokens: int) -> bool:
        """False: no replica has so much room. True is a maybe."""
        return bool(self._idle) or (self.has_room and -self._by_room.least() >= num_tokens)

    def has_idle(self, exclude: Collection[str]) -> bool:
        return bool(self._idle) and not self._idle.issubset(exclude)

    def takers(self, exclude: Collection[str], now: float) -> Iterator[Replica]:
        """Those that may be sent something, with or without room."""
        return (
            replica
            for replica in self._replicas.values()
            if replica.replica_id not in exclude and replica.may_take(now)
        )

    def ranked(
        self, request_id: str, exclude: Collection[str], length: int | None = None
    ) -> Iterator[Replica]:
        """Replicas with room for something, least busy first; of one length class or of all."""
        ranking = self._by_load if length is None else self._by_class.get(length, ())
        return self._usable(ranking, request_id, exclude)

    def usable(self, replica_id: str, request_id: str, exclude: Collection[str]) -> Replica | None:
        """The replica, if this request may go there and it has room for something."""
        if replica_id not in self._by_load:
            return None
        return next(self._usable((replica_id,), request_id, exclude), None)

    def least_busy(
        self, request_id: str, num_tokens: int, num_prefill_tokens: int, exclude: Collection[str]
    ) -> Replica | None:
        """The least busy one on which the request can start; there must be one with room. Where
        very many have KV for it and few have all else, the search may end without these."""
        if not self._idle and -self._by_prefill_room.least() < num_prefill_tokens:
            return None
        roomy: list[Replica] = []
        for replica in self._usable(self._by_room, request_id, exclude):
            if len(roomy) == _MAX_LOOKED_AT:
                break
            if replica.free_tokens < num_tokens and not replica.is_idle:
                return _least_loaded(roomy, num_tokens, num_prefill_tokens)
            roomy.append(replica)
        for replica in islice(self._usable(self._by_load, request_id, exclude), _MAX_LOOKED_AT):
            if replica.fits(num_tokens, num_prefill_tokens):
                return replica
        return _least_loaded(roomy, num_tokens, num_prefill_tokens)

    def reserve(self, request_id: str, exclude: Collection[str], now: float) -> None:
        """Keeps a replica for a request that fits nowhere: the one with the most room, which takes
        nothing else until it fits. At most every second replica is kept so, or the only one.
        """
        if len(self.reserved) >= max(len(self._replicas) // 2, 1):
            return
        if request_id in self.reserved.values():
            return
        free = [r for r in self.takers(exclude, now) if r.replica_id not in self.reserved]
        if free:
            most = max(free, key=lambda replica: (replica.free_tokens, replica.replica_id))
            self.reserved[most.replica_id] = request_id

    def release(self, request_id: str) -> bool:
        """Ends its reservation; False where it had none."""
        kept = [name for name, holder in self.reserved.items() if holder == request_id]
        for name in kept:
            del self.reserved[name]
        return bool(kept)

    def _growth(self, request: LiveRequest) -> int:
        done = request.num_output_tokens
        return self._outputs.expected(request.max_tokens, done) - done

    def _find_strays(self, replica_id: str, report: ReplicaReport, now: float) -> None:
        """A request that was sent elsewhere came here: the cluster does not send there, for now."""
        for request in report.live:
            elsewhere = self._sent_to.get(request.request_id, replica_id)
            if elsewhere == replica_id:
                continue
            other = self._replicas[elsewhere]
            debit = other.debits.pop(request.request_id)
            self._replicas[replica_id].debits[request.request_id] = debit
            self._sent_to[request.request_id] = replica_id
            other.rests_until = self._resting[elsewhere] = now + self._report_timeout_s
            other.recount(self._growth)
            self._rank(other, now)

    def _usable(
        self, order: Collection[str], request_id: str, exclude: Collection[str]
    ) -> Iterator[Replica]:
        for replica_id in order:
            if replica_id in exclude or self.reserved.get(replica_id, request_id) != request_id:
                continue
            yield self._replicas[replica_id]

    def _drop(self, replica_id: str) -> None:
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return
        for request_id in replica.debits:
            self._sent_to.pop(request_id, None)
        self.reserved.pop(replica_id, None)
        self._resting.pop(replica_id, None)
        self._unrank(replica_id)

    def _rank(self, replica: Replica, now: float) -> None:
        name = replica.replica_id
        if replica.is_full or not replica.may_take(now):
            self._unrank(name)
            return
        load, length = replica.load, replica.length_class
        self._by_load.put(name, load)
        self._by_room.put(name, -float(replica.free_tokens))
        self._by_prefill_room.put(name, -replica.prefill_room)
        if self._class_of.get(name) != length:
            self._unclass(name)
        if length is not None:
            self._class_of[name] = length
            self._by_class.setdefault(length, Ranking()).put(name, load)
        if replica.is_idle:
            self._idle.add(name)
        else:
            self._idle.discard(name)

    def _unrank(self, name: str) -> None:
        self._by_load.discard(name)
        self._by_room.discard(name)
        self._by_prefill_room.discard(name)
        self._idle.discard(name)
        self._unclass(name)

    def _unclass(self, name: str) -> None:
        length = self._class_of.pop(name, None)
        if length is not None:
            self._by_class[length].discard(name)


def _least_loaded(
    replicas: Iterable[Replica], num_tokens: int, num_prefill_tokens: int
) -> Replica | None:
    fitting = [r for r in replicas if r.fits(num_tokens, num_prefill_tokens)]
    return min(fitting, key=lambda r: (r.load, r.replica_id), default=None)
