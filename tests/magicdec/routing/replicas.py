"""Replicas as a router's tests need them: a clock that is moved, and pools that are counted."""

from dataclasses import dataclass, field

from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport
from magicdec.routing.settings import Ask
from magicdec.stats import EngineLoad


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def report(
    free: int = 1000,
    *,
    total: int = 1000,
    running: int = 0,
    waiting: int = 0,
    prefill: int = 0,
    live: tuple[LiveRequest, ...] = (),
    finished: tuple[FinishedRequest, ...] = (),
    prefixes: tuple[tuple[int, ...], ...] = (),
    number: int = 0,
    max_num_seqs: int = 16,
    max_batch_tokens: int = 512,
    draining: bool = False,
) -> ReplicaReport:
    return ReplicaReport(
        number=number,
        load=EngineLoad(running, waiting, free, total, num_prefill_tokens=prefill),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        live=live,
        finished=finished,
        prefixes=prefixes,
        draining=draining,
    )


@dataclass(slots=True)
class CountedReplica:
    """Holds what it is given; what it still has to prefill is `uncomputed`."""

    total: int
    max_num_seqs: int
    max_batch_tokens: int = 1024
    live: dict[str, Ask] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    uncomputed: dict[str, int] = field(default_factory=dict)
    finished: list[FinishedRequest] = field(default_factory=list)
    draining: bool = False
    number: int = 0

    def take(self, ask: Ask) -> None:
        self.live[ask.request_id] = ask
        self.outputs[ask.request_id] = 0
        self.uncomputed[ask.request_id] = ask.num_context_tokens

    def step(self, request_id: str) -> None:
        """Its prefill, or its next token."""
        if self.uncomputed.pop(request_id, None) is not None or (
            self.outputs[request_id] + 1 < self.live[request_id].max_tokens
        ):
            self.outputs[request_id] += 1

    def end(self, request_id: str, *, answered: bool) -> None:
        ask = self.live.pop(request_id)
        self.uncomputed.pop(request_id, None)
        num_tokens = self.outputs.pop(request_id)
        if answered:
            end = FinishedRequest(
                request_id, ask.num_context_tokens, max(num_tokens, 1), ask.max_tokens
            )
            self.finished.append(end)

    def report(self) -> ReplicaReport:
        self.number += 1
        held = sum(a.num_context_tokens + self.outputs[r] for r, a in self.live.items())
        finished, self.finished = tuple(self.finished), []
        live = tuple(LiveRequest(r, self.outputs[r], a.max_tokens) for r, a in self.live.items())
        return report(
            max(self.total - held, 0),
            total=self.total,
            running=len(self.live),
            prefill=sum(self.uncomputed.values()),
            live=live,
            finished=finished,
            number=self.number,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            draining=self.draining,
        )
