"""Which replica takes a request: a pure decision over what the replicas last reported.

Debits its own assignments at once, since a report is up to half a second old: without that, a
burst between two reports would all land on the replica that looked emptiest.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from magicdec.stats import EngineLoad

Clock = Callable[[], float]  # seconds, monotonic


@dataclass(frozen=True, slots=True)
class Assignment:
    """`replica_id` None: no replica is known. `retry_after_s` set: the queue is full, refuse."""

    replica_id: str | None
    retry_after_s: float | None = None


@dataclass(slots=True)
class _Debit:
    """An assignment that no report holds yet. `waits`: the replica had no room when it was made."""

    at: float
    num_tokens: int
    waits: bool


@dataclass(slots=True)
class _Replica:
    load: EngineLoad
    reported_at: float
    debits: list[_Debit] = field(default_factory=list)

    def free_kv_tokens(self) -> int:
        return self.load.free_kv_tokens - sum(debit.num_tokens for debit in self.debits)

    def num_queued(self) -> int:
        return self.load.num_waiting + sum(debit.waits for debit in self.debits)

    def has_room(self, num_tokens: int) -> bool:
        return self.load.num_waiting == 0 and self.free_kv_tokens() >= num_tokens


class Admission:
    """Not thread-safe; one owner calls it.

    A replica is live while its last report is younger than `report_timeout_s`. One that a caller
    reported dead is ignored for as long, so that a late report of a dead replica does not revive
    it while a wrong accusation does not exclude a healthy one for ever.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_queued_requests: int,
        report_timeout_s: float = 3.0,
        settle_s: float = 0.5,
        retry_after_s: float = 2.0,
    ) -> None:
        self._clock = clock
        self._max_queued_requests = max_queued_requests
        self._report_timeout_s = report_timeout_s
        self._settle_s = settle_s
        self._retry_after_s = retry_after_s
        self._replicas: dict[str, _Replica] = {}
        self._dead_since: dict[str, float] = {}

    def report(self, replica_id: str, load: EngineLoad) -> None:
        """Takes a replica's load.

        A replica counts a request from the moment that it arrives, even during a step, so only the
        way there has to be waited for: assignments older than `settle_s` are in the load by now.
        """
        now = self._clock()
        self._forget(now)
        if replica_id in self._dead_since:
            return
        known = self._replicas.get(replica_id)
        debits = [d for d in known.debits if now - d.at < self._settle_s] if known else []
        self._replicas[replica_id] = _Replica(load, now, debits)

    def mark_dead(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)
        self._dead_since[replica_id] = self._clock()

    def live_replicas(self) -> list[str]:
        self._forget(self._clock())
        return sorted(self._replicas)

    def assign(
        self, num_tokens: int, exclude: Collection[str] = (), *, resumed: bool = False
    ) -> Assignment:
        """The replica for a request that will hold up to `num_tokens` of KV.

        One that has room now comes first, then the shortest queue, then the most free KV. The
        queue's bound refuses only requests that would wait, and never a `resumed` one: its client
        has a part of the answer, and it was counted when it first came.
        """
        now = self._clock()
        self._forget(now)
        candidates = {k: r for k, r in self._replicas.items() if k not in exclude}
        if not candidates:
            return Assignment(None)

        def cost(replica_id: str) -> tuple[bool, int, int, str]:
            replica = candidates[replica_id]
            free = replica.free_kv_tokens()
            return (not replica.has_room(num_tokens), replica.num_queued(), -free, replica_id)

        chosen = min(candidates, key=cost)
        waits = not candidates[chosen].has_room(num_tokens)
        if waits and not resumed and self._num_queued() >= self._max_queued_requests:
            return Assignment(None, self._retry_after_s)
        candidates[chosen].debits.append(_Debit(now, num_tokens, waits))
        return Assignment(chosen)

    def _num_queued(self) -> int:
        return sum(replica.num_queued() for replica in self._replicas.values())

    def _forget(self, now: float) -> None:
        limit = self._report_timeout_s
        self._replicas = {k: r for k, r in self._replicas.items() if now - r.reported_at < limit}
        self._dead_since = {k: t for k, t in self._dead_since.items() if now - t < limit}
