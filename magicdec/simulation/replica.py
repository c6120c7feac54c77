"""A simulated engine: continuous batching with chunked prefill, on the clock of its rounds.

It follows scheduler.py in whom it admits and preempts (queues.py), and in how a step's rows are
divided between drafts and prompts (steps.py). What differs: rounds that are alike, with nothing to
prefill, are taken as one, at the cost of their middle.
"""

import math
from collections.abc import Sequence

from magicdec.control.round_choice import RowOutcome
from magicdec.control.round_costs import RoundCosts
from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import Drafting
from magicdec.simulation.jobs import Job
from magicdec.simulation.queues import Queues
from magicdec.simulation.steps import EngineShape, Rounds, StepPlanner
from magicdec.stats import EngineLoad

_ROUNDING = 1e-9


class SimulatedReplica:
    """`submit` when a request arrives, `end_rounds` at the time that either returned last."""

    def __init__(
        self, shape: EngineShape, costs: RoundCosts, drafting: Drafting, law: AcceptanceLaw
    ) -> None:
        self._shape = shape
        self._drafting = drafting
        self._law = law
        self._planner = StepPlanner(shape, costs, drafting)
        self._current: Rounds | None = None
        self._live: dict[int, Job] = {}
        self._queues = Queues(shape.total_kv_tokens, shape.max_num_seqs)
        self._finished: list[FinishedRequest] = []
        self._num_reports = 0
        self.busy_s = 0.0
        self.num_row_rounds = 0  # decode rows, summed over the rounds
        self.num_draft_tokens = 0
        self.num_decoded_tokens = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_preemptions(self) -> int:
        return self._queues.num_preemptions

    def submit(self, job: Job, now: float) -> float:
        """Returns when the current round ends: the first at which the newcomer may be admitted."""
        self._live[job.number] = job
        self._queues.enqueue(job)
        current = self._current
        if current is None:
            return self._begin(now)
        current.num_rounds = min(current.num_rounds, _num_done(current, now) + 1)
        return current.end_s

    def end_rounds(self, now: float) -> tuple[list[Job], bool, float | None]:
        """Who finished, whether anyone got its first token, and when the next rounds end; None:
        it idles. Raises RuntimeError where no round runs."""
        ended, self._current = self._current, None
        if ended is None:
            raise RuntimeError("no round is running")
        self._count(ended)
        finished = self._emit(ended)
        started = False
        for job, num_rows in ended.chunks:
            if self._queues.prefill(job, num_rows):
                started |= self._first_token(job, now, finished)
        for job in finished:
            self._finish(job, now)
        self._queues.shrink_prefixes()
        return finished, started, self._begin(now) if self._live else None

    def report(self, now: float) -> ReplicaReport:
        """As EngineReplica sends it; rounds in progress count as far as they have come."""
        emitted, grown = self._emitted(now)
        live = tuple(
            LiveRequest(job.request_id, emitted.get(number, job.emitted), job.trace.max_tokens)
            for number, job in self._live.items()
        )
        finished, self._finished = tuple(self._finished), []
        self._num_reports += 1
        queues = self._queues
        load = EngineLoad(
            num_running=queues.num_running,
            num_waiting=len(queues.waiting),
            free_kv_tokens=max(queues.num_free - grown, 0),
            total_kv_tokens=self._shape.total_kv_tokens,
            num_prefill_tokens=queues.num_prefill_tokens + queues.num_waiting_tokens,
            num_waiting_tokens=queues.num_waiting_tokens,
        )
        limits = self._shape.max_num_seqs, self._shape.max_batch_tokens
        return ReplicaReport(self._num_reports, load, *limits, live, finished)

    def _begin(self, now: float) -> float:
        """Admits whom there is room for and starts the next rounds; returns their end."""
        self._queues.make_room()
        self._queues.admit(self._shape.max_batch_tokens - len(self._queues.decoding))
        self._current = self._planner.plan(self._queues, now)
        return self._current.end_s

    def _emitted(self, now: float) -> tuple[dict[int, int], int]:
        """Output tokens of the decode rows by their numbers, and the tokens emitted since the
        rounds began."""
        current = self._current
        if current is None or not (done := _num_done(current, now)):
            return {}, 0
        emitted = {job.number: p[done] for job, p in zip(current.rows, current.paths, strict=True)}
        return emitted, sum(p[done] - p[0] for p in current.paths)

    def _count(self, ended: Rounds) -> None:
        num_rounds = ended.num_rounds
        self.busy_s += num_rounds * ended.seconds
        self.num_row_rounds += num_rounds * len(ended.rows)
        self.num_draft_tokens += num_rounds * sum(ended.draft_lengths)
        self.num_decoded_tokens += sum(path[num_rounds] - path[0] for path in ended.paths)
        if ended.rows:
            outcomes = _first_outcomes(ended)
            self._drafting.observe(outcomes, num_rounds, ended.decode_seconds)

    def _emit(self, ended: Rounds) -> list[Job]:
        """Moves the decode rows on; returns those that have their answer."""
        finished = []
        for job, path in zip(ended.rows, ended.paths, strict=True):
            self._queues.grow(job, path[ended.num_rounds] - job.emitted)
            if job.emitted == job.trace.num_output_tokens:
                self._queues.decoding.remove(job)
                finished.append(job)
        return finished

    def _first_token(self, job: Job, now: float, finished: list[Job]) -> bool:
        """A prefill's own token; True where it is the request's first."""
        first = math.isnan(job.first_token_s)
        if first:
            job.first_token_s = now
            job.runs = self._law.runs(job.trace, job.number)
        self._queues.grow(job, 1)
        if job.emitted == job.trace.num_output_tokens:
            finished.append(job)
        else:
            self._queues.decode(job)
        return first

    def _finish(self, job: Job, now: float) -> None:
        job.finished_s = now
        job.runs = b""
        del self._live[job.number]
        self._queues.finish(job)
        trace = job.trace
        tokens = trace.num_prompt_tokens, trace.num_output_tokens, trace.max_tokens
        self._finished.append(FinishedRequest(job.request_id, *tokens))


def _num_done(rounds: Rounds, now: float) -> int:
    done = math.floor((now - rounds.start_s) / rounds.seconds + _ROUNDING)
    return min(max(done, 0), rounds.num_rounds)


def _first_outcomes(ended: Rounds) -> Sequence[RowOutcome]:
    """Drafts that the answer's end cut off count as accepted, as the verify pass has them."""
    return [
        RowOutcome(length, min(job.runs[path[0]], length))
        for job, length, path in zip(ended.rows, ended.draft_lengths, ended.paths, strict=True)
    ]
