"""Discrete events over a router and N replicas: the router's own code on a simulated clock.

arrival -> policy.submit, release -> one hop -> replica -> rounds -> report -> policy.release
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from magicdec.config import check_at_least
from magicdec.control.round_costs import RoundCosts
from magicdec.routing.settings import AdmissionConfig, Ask
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import Drafts
from magicdec.simulation.jobs import Job
from magicdec.simulation.policies import POLICIES
from magicdec.simulation.replica import SimulatedReplica
from magicdec.simulation.result import SimulationResult, summarize
from magicdec.simulation.round_seconds import RememberedCosts
from magicdec.simulation.steps import EngineShape
from magicdec.simulation.trace import TraceRequest, check_fits


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The cluster that is simulated. Raises ConfigError naming field, value and limit."""

    num_replicas: int
    engine: EngineShape
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    hop_s: float = 0.005  # from the router's answer to the replica
    report_period_s: float = 0.5
    least_report_period_s: float = 0.05  # after a first token or an end, a report comes as soon

    def __post_init__(self) -> None:
        check_at_least("num_replicas", self.num_replicas, 1)
        check_at_least("hop_s", self.hop_s, 0)
        check_at_least("least_report_period_s", self.least_report_period_s, 0)
        check_at_least("report_period_s", self.report_period_s, self.least_report_period_s)


class SimulatedClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests sorted by arrival, and which of their drafts would be accepted."""

    requests: Sequence[TraceRequest]
    law: AcceptanceLaw = field(default_factory=AcceptanceLaw)


Progress = Callable[[int], None]  # told how many requests have ended, every now and then


def simulate(
    workload: Workload,
    policy: str,
    drafts: Drafts,
    config: ClusterConfig,
    costs: RoundCosts,
    progress: Progress | None = None,
) -> SimulationResult:
    """Runs a trace to its end; the same arguments give the same result.

    `policy` names one of POLICIES. Rounds take what `costs` says, which the controller knows too.
    Clients neither leave nor come back: a refused request is only counted. Raises KeyError for an
    unknown policy, TraceError for a request that fits no replica.
    """
    check_fits(workload.requests, config.engine.total_kv_tokens)
    return _Simulation(workload, policy, drafts, config, costs).run(progress)


# An event is (time, order, what, replica, version or job); what comes first at equal times is what
# was planned first.
_ROUNDS_END, _DELIVERY, _REPORT, _TIMER = range(4)
_EVENTS_BETWEEN_TELLING = 5000
_Event = tuple[float, int, int, int, "int | Job"]


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        policy: str,
        drafts: Drafts,
        config: ClusterConfig,
        costs: RoundCosts,
    ) -> None:
        self._requests = workload.requests
        self._labels = (policy, drafts.name)
        self._config = config
        self._clock = SimulatedClock()
        # Simulated replicas do not die, those that idle do not report, and clients wait.
        patient = replace(config.admission, report_timeout_s=math.inf, lease_s=math.inf)
        self._policy = POLICIES[policy](self._clock, patient)
        costs = RememberedCosts(costs)
        self._replicas = [
            SimulatedReplica(config.engine, costs, drafts.drafting(costs), workload.law)
            for _ in range(config.num_replicas)
        ]
        self._names = [f"replica-{i:05}" for i in range(config.num_replicas)]
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._events: list[_Event] = []
        self._num_events = 0
        self._versions = [0] * config.num_replicas  # of the end of the current rounds
        self._reported_at = [0.0] * config.num_replicas
        self._report_due = [math.inf] * config.num_replicas
        self._timer_due = math.inf
        self._asked: dict[str, Job] = {}
        self._finished: list[Job] = []
        self._num_refused = 0

    def run(self, progress: Progress | None) -> SimulationResult:
        self._clock.now = self._requests[0].arrival_s if self._requests else 0.0
        for i in range(len(self._replicas)):
            self._report(i)
        arrivals = told = 0
        while arrivals < len(self._requests) or self._events:
            next_event = self._events[0][0] if self._events else math.inf
            if arrivals < len(self._requests) and (
                self._requests[arrivals].arrival_s <= next_event
            ):
                self._arrive(arrivals)
                arrivals += 1
            else:
                self._handle(heapq.heappop(self._events))
            if progress is not None and self._num_events >= told + _EVENTS_BETWEEN_TELLING:
                told = self._num_events
                progress(len(self._finished) + self._num_refused)
        return summarize(*self._labels, self._finished, self._num_refused, self._replicas)

    def _arrive(self, number: int) -> None:
        trace = self._requests[number]
        self._clock.now = trace.arrival_s
        job = Job(number, trace, trace.arrival_s)
        self._asked[job.request_id] = job
        self._policy.submit(
            Ask(
                job.request_id,
                trace.num_prompt_tokens,
                trace.max_tokens,
                trace.key,
                trace.prefix_hashes(number),
            )
        )
        self._release()

    def _handle(self, event: _Event) -> None:
        self._clock.now, _, what, replica, detail = event
        if what == _ROUNDS_END:
            if detail == self._versions[replica]:
                self._end_rounds(replica)
        elif what == _REPORT:
            if self._report_due[replica] == self._clock.now:
                self._report(replica)
                self._release()
        elif what == _DELIVERY:
            assert isinstance(detail, Job)
            self._await_end(replica, self._replicas[replica].submit(detail, self._clock.now))
            self._plan_report(replica, self._config.report_period_s)
        elif self._timer_due == self._clock.now:
            self._timer_due = math.inf
            self._release()

    def _release(self) -> None:
        now = self._clock.now
        for decided in self._policy.release():
            job = self._asked.pop(decided.request_id)
            if decided.replica_id is None:
                self._num_refused += 1
            else:
                self._push(
                    now + self._config.hop_s, _DELIVERY, self._numbers[decided.replica_id], job
                )
        due = self._policy.next_due()
        if due is not None and max(due, now) < self._timer_due:
            self._timer_due = max(due, now)
            self._push(self._timer_due, _TIMER, 0, 0)

    def _end_rounds(self, replica: int) -> None:
        now = self._clock.now
        finished, started, end = self._replicas[replica].end_rounds(now)
        self._finished += finished
        if end is not None:
            self._await_end(replica, end)
        if finished or started:
            self._plan_report(replica, self._config.least_report_period_s)

    def _await_end(self, replica: int, end: float) -> None:
        self._versions[replica] += 1
        self._push(end, _ROUNDS_END, replica, self._versions[replica])

    def _report(self, replica: int) -> None:
        now = self._clock.now
        self._policy.report(self._names[replica], self._replicas[replica].report(now))
        self._reported_at[replica] = now
        self._report_due[replica] = math.inf
        if self._replicas[replica].num_live:
            self._plan_report(replica, self._config.report_period_s)

    def _plan_report(self, replica: int, after_s: float) -> None:
        """So long after the last one, unless one is due before."""
        due = max(self._reported_at[replica] + after_s, self._clock.now)
        if due < self._report_due[replica]:
            self._report_due[replica] = due
            self._push(due, _REPORT, replica, 0)

    def _push(self, time: float, what: int, replica: int, detail: "int | Job") -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, what, replica, detail))
