"""The router's decisions: which request goes next, with whom, and to which replica.

Pure: no Ray, no thread, and its clock is given to it. The owner hands in what it hears and then
asks `release` for what follows; the simulator does the same on simulated time.
"""

import logging
from collections import Counter
from collections.abc import Callable

from magicdec.routing.fair_queue import FairQueue
from magicdec.routing.patience import Patience
from magicdec.routing.placement import Place, Placement
from magicdec.routing.prefix_affinity import PrefixAffinity
from magicdec.routing.replica import Debit, Replica
from magicdec.routing.replica_table import ReplicaTable
from magicdec.routing.reports import ReplicaReport, find_flaw
from magicdec.routing.settings import AdmissionConfig, AdmissionStats, Ask, Assignment
from magicdec.routing.traffic import DrainRate, OutputEstimate
from magicdec.routing.waiting import Waiting

logger = logging.getLogger(__name__)

Clock = Callable[[], float]  # seconds, monotonic

_TICK_S = 0.25  # while requests wait, leases and silent replicas are looked at so often


class Admission:
    """Not thread-safe; one owner calls it.

    Requests wait here, not in the replicas: one is sent when it can start at once, in KV tokens
    (context and expected answer), sequences and steps of prefill, and is debited until a report of
    the replica has it. Keys take turns (fair_queue.py); who goes where is placement.py's.

        submit -> queue -> [company, at most company_wait_s] -> turn of its key -> room -> sent
    """

    def __init__(self, clock: Clock, config: AdmissionConfig | None = None) -> None:
        self._clock = clock
        self._config = config = config or AdmissionConfig()
        self._queue = FairQueue(config.fairness_slack_tokens)
        self._outputs = OutputEstimate()
        self._drain = DrainRate(
            least_s=config.min_retry_after_s,
            most_s=config.max_retry_after_s,
            unknown_s=config.unknown_retry_after_s,
        )
        self._affinity = PrefixAffinity(config.max_prefix_hashes)
        self._table = ReplicaTable(
            self._outputs,
            report_timeout_s=config.report_timeout_s,
            debit_timeout_s=config.debit_timeout_s,
        )
        self._placement = Placement(
            self._table,
            self._affinity if config.prefix_affinity else None,
            length_classes=config.length_classes,
            overload_factor=config.overload_factor,
        )
        self._patience = Patience(company_wait_s=config.company_wait_s, lease_s=config.lease_s)
        self._counts: Counter[str] = Counter()

    def submit(self, ask: Ask) -> Assignment | None:
        """Queues a request, or says again where it was sent: an answer may have been lost. Asking
        again for one that waits keeps its place. Follow it with `release`."""
        now = self._clock()
        replica_id = self._table.sent_to(ask.request_id)
        if replica_id is not None:
            return Assignment(ask.request_id, replica_id)
        if ask.request_id in self._queue:
            self._patience.renew(ask.request_id, now)
        else:
            answer = self._outputs.expected(ask.max_tokens)
            self._queue.add(Waiting.of(ask, answer, now, self._config.age_bound_s))
            self._patience.begin(ask.request_id, now)
        return None

    def cancel(self, request_id: str) -> None:
        """Its client has left. One that was sent already is the replica's to end."""
        if request_id in self._queue:
            self._remove(request_id)

    def report(self, replica_id: str, report: ReplicaReport) -> bool:
        """Takes what a replica says. False where it is not counted: it cannot be true (and counts
        as silence), it is late, or the replica was reported dead. Follow it with `release`."""
        now = self._clock()
        self._table.expire(now)
        flaw = find_flaw(report)
        if flaw is not None:
            self._counts["dropped"] += 1
            if self._counts["dropped"].bit_count() == 1:  # ever more rarely
                logger.warning("a report of %s was dropped: %s", replica_id, flaw)
            return False
        ended = self._table.report(replica_id, report, now)
        if ended is None:
            return False
        for debit, answer in ended:
            if answer is not None:  # the charge was an estimate
                actual = answer.num_prompt_tokens + answer.num_output_tokens
                self._queue.charge(debit.key, actual - debit.num_tokens)
        for finished in report.finished:
            self._outputs.learn(finished.max_tokens, finished.num_output_tokens)
            self._drain.finished(finished.num_prompt_tokens + finished.num_output_tokens, now)
        self._affinity.recall(replica_id, report.prefixes)
        return True

    def mark_dead(self, replica_id: str) -> None:
        """Somebody lost it. Its requests come back as new asks of whoever waits for them."""
        self._table.mark_dead(replica_id, self._clock())
        self._affinity.forget(replica_id)

    def live_replicas(self) -> list[str]:
        self._table.expire(self._clock())
        return sorted(replica.replica_id for replica in self._table)

    def replica(self, replica_id: str) -> Replica | None:
        """What is known of a live replica; not to be changed."""
        return self._table.get(replica_id)

    def next_due(self) -> float | None:
        """When `release` is worth calling though nothing was heard; None: while nobody waits."""
        if not self._queue:
            return None
        now = self._clock()
        return min(self._patience.next_due(now), now + _TICK_S)

    def stats(self) -> AdmissionStats:
        now = self._clock()
        return AdmissionStats(
            num_queued=len(self._queue),
            num_queued_tokens=self._queue.num_tokens,
            num_live_replicas=len(self._table),
            num_reserved_replicas=len(self._table.reserved),
            num_released=self._counts["released"],
            num_refused=self._counts["refused"],
            num_abandoned=self._counts["abandoned"],
            num_dropped_reports=self._counts["dropped"],
            drain_tokens_per_s=self._drain.tokens_per_s(now),
            num_queued_by_class=self._queue.num_by_class,
        )

    def release(self) -> list[Assignment]:
        """Everything that is decided by now, in the order of the decisions."""
        now = self._clock()
        self._expire(now)
        decided = self._blind(now)
        self._placement.look_anew()
        while True:
            while self._table.has_room and (batch := self._next_batch(now)):
                decided += batch
            if (refused := self._refuse_one(now)) is None:
                return decided
            decided.append(refused)  # a replica may have been kept for it

    def _refuse_one(self, now: float) -> Assignment | None:
        too_long = len(self._queue) > self._config.max_queued_requests
        if not too_long or (victim := self._queue.victim()) is None:
            return None
        self._counts["refused"] += 1
        self._remove(victim.request_id)
        retry_after_s = self._drain.retry_after_s(self._queue.num_tokens, now)
        return Assignment(victim.request_id, None, retry_after_s)

    def _next_batch(self, now: float) -> list[Assignment]:
        """The next turn: of the least served key that has a request with room, and its company."""
        for key in self._queue.turns():
            offers = self._queue.offers(key)
            for request in offers:
                if not self._is_ready(request, now):
                    continue
                place = self._placement.choose(request)
                if place is not None:
                    return self._send_batch(request, place, now)
                nowhere = request.exclude and not any(self._table.takers(request.exclude, now))
                if nowhere and request is offers[0]:
                    self._remove(request.request_id)
                    return [Assignment(request.request_id, None)]
                if request is offers[0] and self._must_not_be_passed(request, now):
                    self._table.reserve(request.request_id, request.exclude, now)
        return []

    def _must_not_be_passed(self, request: Waiting, now: float) -> bool:
        """Whether it is beyond its age bound, or its key too far behind the others. Then it waits
        for no company, and a replica without room is kept for it: smaller ones would take whatever
        becomes free."""
        behind = self._queue.lag(request.key)
        return request.first_at <= now or behind > self._config.fairness_slack_tokens

    def _send_batch(self, first: Waiting, place: Place, now: float) -> list[Assignment]:
        """One request, and those of its length that can begin in the same step of that replica;
        alone while another replica idles."""
        replica = place.replica
        batch = [self._send(first, place, now)]
        if not self._config.length_classes or self._table.has_idle(()):
            return batch
        room = replica.report.max_batch_tokens - replica.num_prefill_tokens
        for request in self._queue.company(first.length_class, now):
            cached = self._placement.cached(replica, request.prefix_hashes)
            num_prefill = request.num_context_tokens - cached
            if num_prefill > room:
                break
            may_go = (
                replica.replica_id not in request.exclude
                and replica.fits(request.num_tokens, num_prefill)
                and not self._placement.has_other_home(request, replica)
            )
            if may_go:
                batch.append(self._send(request, Place(replica, cached), now))
                room -= num_prefill
        return batch

    def _send(self, request: Waiting, place: Place, now: float) -> Assignment:
        num_prefill = request.num_context_tokens - place.num_cached_tokens
        name, num_tokens = request.request_id, request.num_tokens
        self._queue.charge(request.key, num_tokens)  # before it leaves: its key may leave with it
        self._remove(name)
        debit = Debit(name, request.key, num_tokens, num_prefill, now)
        self._table.send(place.replica, debit, request.length_class)
        answer = num_tokens - request.num_context_tokens
        replica_id = place.replica.replica_id
        self._affinity.record(replica_id, request.prefix_hashes, num_prefill + answer)
        self._drain.sent(num_tokens, now)
        self._counts["released"] += 1
        return Assignment(name, replica_id, None, num_tokens, place.num_cached_tokens)

    def _is_ready(self, request: Waiting, now: float) -> bool:
        """Whether it waits for no company: it has waited, there is enough of it to fill a step, a
        replica idles, the queue is too long, or others would pass it."""
        return (
            not self._config.length_classes
            or not self._patience.wants_company(request.request_id, now)
            or self._must_not_be_passed(request, now)
            or self._table.has_idle(request.exclude)
            or self._queue.class_tokens(request.length_class) >= self._table.max_batch_tokens
            or len(self._queue) > self._config.max_queued_requests
        )

    def _blind(self, now: float) -> list[Assignment]:
        """While no replica is known that takes anything, requests wait for one to report, and then
        go wherever the cluster sends them."""
        if self._table.has_room or any(self._table.takers((), now)):
            return []
        waited = now - self._config.blind_wait_s
        found = [w.request_id for w in self._queue if w.queued_at <= waited]
        for request_id in found:
            self._remove(request_id)
        return [Assignment(request_id, None) for request_id in found]

    def _expire(self, now: float) -> None:
        self._table.expire(now)
        for request_id in self._patience.abandoned(now):
            self._counts["abandoned"] += 1
            self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        self._queue.remove(request_id)
        if self._table.release(request_id):
            self._placement.look_anew()
        self._patience.end(request_id)
