"""The Router: one actor that knows every replica's load and says which one takes a request.

Off the token path: the ingress asks it once a request, and again while the request waits. If it is
away, requests that are new go where Serve sends them, those that waited ask the next Router, which
knows every replica after one report period.
"""

import asyncio
import logging
import time
from dataclasses import replace

from magicdec.admission import Admission
from magicdec.control.policy_pool import PolicyPool
from magicdec.control.policy_snapshot import PackedPolicy
from magicdec.deployments.replica_report import ReportAnswer
from magicdec.routing.reports import ReplicaReport
from magicdec.routing.settings import AdmissionConfig, AdmissionStats, Ask, Assignment

logger = logging.getLogger(__name__)


class Router:
    """A thin actor around `Admission`, which decides, and `PolicyPool`, which knows what the
    replicas have learnt. One replica, one event loop."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._admission = Admission(time.monotonic, config)
        self._pool = PolicyPool(time.monotonic())
        self._waiters: dict[str, asyncio.Future[Assignment | None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def report(
        self, replica_id: str, report: ReplicaReport, policy: PackedPolicy | None = None
    ) -> ReportAnswer:
        """What cannot be true of either, report or policy, is dropped, and leaves the other."""
        knew = self._admission.replica(replica_id) is not None
        others = self._pool.exchange(replica_id, policy, time.monotonic())
        self._admission.report(replica_id, report)
        self._release()
        return ReportAnswer(knew, others, self._admission.stats().num_queued_tokens)

    async def mark_dead(self, replica_id: str) -> None:
        logger.warning("replica %s was reported dead", replica_id)
        self._admission.mark_dead(replica_id)
        self._release()

    async def assign(self, ask: Ask, wait_s: float) -> Assignment | None:
        """None: it still waits after `wait_s`. Asking again keeps its place, not asking gives it
        up: so no request is kept for an ingress that has died."""
        sent = self._admission.submit(ask)
        if sent is not None:
            return sent
        older = self._waiters.get(ask.request_id)
        if older is not None and not older.done():  # an answer that nobody hears any more
            older.set_result(None)
        waiter: asyncio.Future[Assignment | None] = asyncio.get_running_loop().create_future()
        self._waiters[ask.request_id] = waiter
        self._release()
        try:
            async with asyncio.timeout(wait_s):
                return await waiter
        except TimeoutError:
            return None
        finally:
            if self._waiters.get(ask.request_id) is waiter:
                del self._waiters[ask.request_id]

    async def cancel(self, request_id: str) -> None:
        """Its client has left."""
        self._admission.cancel(request_id)
        self._release()

    async def live_replicas(self) -> list[str]:
        return self._admission.live_replicas()

    async def stats(self) -> AdmissionStats:
        dropped = self._pool.num_dropped
        return replace(self._admission.stats(), num_dropped_policies=dropped)

    def _release(self) -> None:
        """Tells those who wait what is decided, and comes back when the next decision is due."""
        for decided in self._admission.release():
            waiter = self._waiters.pop(decided.request_id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(decided)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._admission.next_due()
        if due is not None:
            delay_s = max(due - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._release)
