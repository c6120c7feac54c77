"""One replica as the router sees it: its last report, and what was sent to it since."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport

# Steps of prefill that may wait in a replica. With more, where a request goes is decided too early
# and short prompts wait behind long ones (of 2 to 32 steps, 4 had the best first tokens of all
# length classes in simulated traces); with fewer, a replica may run dry between two reports.
MAX_PREFILL_STEPS = 4

ExpectedOutput = Callable[[LiveRequest], int]  # tokens that its answer still gets


@dataclass(slots=True)
class Debit:
    """A request sent to a replica that has not ended as far as is known.

    `arrived`: a report had it. Until then its tokens are in no report, and counted here.
    """

    request_id: str
    key: str
    num_tokens: int  # what it was charged: context and expected answer
    num_prefill_tokens: int  # of its context, what the cache probably lacks
    at: float
    arrived: bool = False


@dataclass(slots=True, eq=False)
class Replica:
    """Tokens and sequences with the debits included; `update` and `send` keep them so."""

    replica_id: str
    report: ReplicaReport
    reported_at: float
    debits: dict[str, Debit] = field(default_factory=dict)
    length_class: int | None = None  # of what it was sent last; None: it has nothing
    rests_until: float = 0.0  # the cluster does not send there
    num_seqs: int = 0
    committed_tokens: int = 0  # KV that is held or will be, by what is expected
    num_prefill_tokens: int = 0

    @property
    def total_kv_tokens(self) -> int:
        return self.report.load.total_kv_tokens

    @property
    def free_tokens(self) -> int:
        return max(self.total_kv_tokens - self.committed_tokens, 0)

    @property
    def prefill_room(self) -> float:
        """Tokens of prefill that it may be sent: any number where none waits."""
        if self.num_prefill_tokens == 0:
            return math.inf
        return MAX_PREFILL_STEPS * self.report.max_batch_tokens - self.num_prefill_tokens

    @property
    def is_idle(self) -> bool:
        return self.num_seqs == 0

    @property
    def load(self) -> float:
        """How busy it is: steps of prefill that wait, and the share of the KV pool.

        Waiting prefill keeps the next first token back, at a full step each; what is held makes
        every step longer, at most by about one.
        """
        steps = self.num_prefill_tokens / self.report.max_batch_tokens
        return steps + self.committed_tokens / self.total_kv_tokens

    def load_with(self, num_tokens: int, num_prefill_tokens: int) -> float:
        """The load once it also has this request."""
        steps = num_prefill_tokens / self.report.max_batch_tokens
        return self.load + steps + num_tokens / self.total_kv_tokens

    def may_take(self, now: float) -> bool:
        """Whether it is sent anything at all; room is another question."""
        return not self.report.draining and self.rests_until <= now

    @property
    def is_full(self) -> bool:
        """Whether not even the smallest request fits."""
        if self.is_idle:
            return False
        no_seat = self.num_seqs >= self.report.max_num_seqs
        return no_seat or self.prefill_room <= 0 or self.free_tokens == 0

    def fits(self, num_tokens: int, num_prefill_tokens: int) -> bool:
        """Whether a request can start at once. An idle replica takes anything: one that is larger
        than every pool fits nowhere better."""
        if self.is_idle:
            return True
        if self.num_seqs >= self.report.max_num_seqs:
            return False
        if num_prefill_tokens > self.prefill_room:
            return False
        return self.committed_tokens + num_tokens <= self.total_kv_tokens

    def send(self, debit: Debit, length_class: int) -> None:
        self.debits[debit.request_id] = debit
        self.length_class = length_class
        self._count(debit)

    def update(
        self, report: ReplicaReport, now: float, expected: ExpectedOutput, debit_timeout_s: float
    ) -> list[tuple[Debit, FinishedRequest | None]]:
        """Takes a new report; returns the debits that ended, with the answer where there is one.

        A request that the report has is in its load. One that it does not have is on its way, until
        it is too old for that: then nobody brought it.
        """
        self.report, self.reported_at = report, now
        live = {request.request_id for request in report.live}
        finished = {request.request_id: request for request in report.finished}
        ended: list[tuple[Debit, FinishedRequest | None]] = []
        for debit in list(self.debits.values()):
            if debit.request_id in live:
                debit.arrived = True
            elif debit.arrived or debit.request_id in finished or now - debit.at >= debit_timeout_s:
                del self.debits[debit.request_id]
                ended.append((debit, finished.get(debit.request_id)))
        self.recount(expected)
        return ended

    def recount(self, expected: ExpectedOutput) -> None:
        """The totals, from the report and the debits that it does not hold."""
        load, live = self.report.load, self.report.live
        self.num_seqs = max(load.num_running + load.num_waiting, len(live))
        held = load.total_kv_tokens - load.free_kv_tokens
        growth = sum(expected(request) for request in live)
        self.committed_tokens = held + load.num_waiting_tokens + growth
        self.num_prefill_tokens = load.num_prefill_tokens
        for debit in self.debits.values():
            if not debit.arrived:
                self._count(debit)
        if self.is_idle:
            self.length_class = None

    def _count(self, debit: Debit) -> None:
        self.num_seqs += 1
        self.committed_tokens += debit.num_tokens
        self.num_prefill_tokens += debit.num_prefill_tokens
