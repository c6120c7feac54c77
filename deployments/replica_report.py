"""What a replica tells the router: its requests, and when that is worth telling at once; and what
it is told. No Ray."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from magicdec.config import SchedulerConfig
from magicdec.control.policy_snapshot import PackedPolicy
from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport
from magicdec.stats import EngineLoad
from magicdec.types import Request, RequestOutput

REPORT_PERIOD_S = 0.5
LEAST_REPORT_PERIOD_S = 0.05
_MAX_PREFIXES = 256  # prompts whose beginnings a router that is new can be told


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """`knew`: the replica had reported before. One that had not tells its prefixes next. `policy`:
    what the other replicas have learnt; None: nothing, or it is not the time. `num_queued_tokens`
    wait in the router, for whoever has room."""

    knew: bool
    policy: PackedPolicy | None = None
    num_queued_tokens: int = 0


class Requests:
    """The requests of one replica, from their arrival to their end. Lives on its event loop.

    What ended stays in the reports until one was taken: the router learns from it.
    """

    def __init__(self, limits: SchedulerConfig) -> None:
        self._limits = limits
        self._live: dict[str, LiveRequest] = {}
        self._finished: list[FinishedRequest] = []
        self._prefixes: OrderedDict[tuple[int, ...], None] = OrderedDict()  # oldest first
        self._router_is_new = True
        self._num_reports = 0
        self.num_queued_tokens = 0  # in the router, as it last said
        self._news = asyncio.Event()

    def begin(self, request: Request, prefix_hashes: tuple[int, ...]) -> None:
        num_output, max_tokens = len(request.emitted_token_ids), request.sampling.max_tokens
        self._live[request.request_id] = LiveRequest(request.request_id, num_output, max_tokens)
        if prefix_hashes:
            self._prefixes[prefix_hashes] = None
            self._prefixes.move_to_end(prefix_hashes)
            if len(self._prefixes) > _MAX_PREFIXES:
                self._prefixes.popitem(last=False)

    def add(self, output: RequestOutput) -> None:
        """A first token makes room for prefill, an end makes room for all: both are news."""
        known = self._live.get(output.request_id)
        if known is None:  # a second stream of a live id was refused
            return
        usage = output.usage
        now = LiveRequest(known.request_id, usage.completion_tokens, known.max_tokens)
        self._live[known.request_id] = now
        if output.finish_reason is not None:
            self._finished.append(
                FinishedRequest(
                    known.request_id, usage.prompt_tokens, usage.completion_tokens, known.max_tokens
                )
            )
        if output.finish_reason is not None or usage.num_rounds == 0:
            self._news.set()

    def end(self, request_id: str) -> None:
        """Its stream is over, for whatever reason."""
        self._live.pop(request_id, None)
        self._news.set()

    def report(self, load: EngineLoad, *, draining: bool = False) -> ReplicaReport:
        self._news.clear()
        self._num_reports += 1
        return ReplicaReport(
            number=self._num_reports,
            load=load,
            max_num_seqs=self._limits.max_num_seqs,
            max_batch_tokens=self._limits.max_batch_tokens,
            live=tuple(self._live.values()),
            finished=tuple(self._finished),
            prefixes=tuple(self._prefixes) if self._router_is_new else (),
            draining=draining,
        )

    def was_taken(self, report: ReplicaReport, answer: ReportAnswer) -> None:
        """The router has the report. If it had not known the replica the next one says more."""
        self.num_queued_tokens = answer.num_queued_tokens
        del self._finished[: len(report.finished)]
        self._router_is_new = not answer.knew and not report.prefixes
        if self._router_is_new and self._prefixes:
            self._news.set()

    async def wait_for_news(self) -> None:
        """Until the next report is due: soon after a first token or an end, else after a period."""
        await asyncio.sleep(LEAST_REPORT_PERIOD_S)
        try:
            async with asyncio.timeout(REPORT_PERIOD_S - LEAST_REPORT_PERIOD_S):
                await self._news.wait()
        except TimeoutError:
            pass
