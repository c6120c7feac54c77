"""The routing policies that are compared: the router's own, parts of it, and Serve's idea."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from magicdec.admission import Admission, Clock
from magicdec.routing.ranking import Ranking
from magicdec.routing.reports import ReplicaReport
from magicdec.routing.settings import AdmissionConfig, Ask, Assignment


class Policy(Protocol):
    """What the simulator asks; Admission is one."""

    def submit(self, ask: Ask) -> Assignment | None: ...

    def report(self, replica_id: str, report: ReplicaReport) -> bool: ...

    def release(self) -> list[Assignment]: ...

    def next_due(self) -> float | None: ...


class LeastRequests:
    """At once to the replica with the fewest requests, whatever they hold. It counts its own
    between reports, and looks at every replica: better informed than Serve's two choices."""

    def __init__(self) -> None:
        self._order = Ranking()
        self._live: dict[str, set[str]] = {}
        self._decided: list[Assignment] = []

    def submit(self, ask: Ask) -> Assignment | None:
        replica_id = next(iter(self._order))
        self._live[replica_id].add(ask.request_id)
        self._order.put(replica_id, len(self._live[replica_id]))
        self._decided.append(Assignment(ask.request_id, replica_id))
        return None

    def report(self, replica_id: str, report: ReplicaReport) -> bool:
        live = self._live.setdefault(replica_id, set())
        live.difference_update(ended.request_id for ended in report.finished)
        self._order.put(replica_id, len(live))
        return True

    def release(self) -> list[Assignment]:
        decided, self._decided = self._decided, []
        return decided

    def next_due(self) -> float | None:
        return None


PolicyFactory = Callable[[Clock, AdmissionConfig], Policy]


def _least_requests(clock: Clock, config: AdmissionConfig) -> Policy:
    return LeastRequests()


def _kv_aware(clock: Clock, config: AdmissionConfig) -> Policy:
    return Admission(clock, replace(config, length_classes=False, prefix_affinity=False))


def _kv_and_prefix(clock: Clock, config: AdmissionConfig) -> Policy:
    return Admission(clock, replace(config, length_classes=False))


POLICIES: dict[str, PolicyFactory] = {
    "least-requests": _least_requests,
    "kv-aware": _kv_aware,
    "kv-aware+prefix": _kv_and_prefix,
    "kv-aware+prefix+classes": Admission,
}
