"""What a simulated run came to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magicdec.routing.waiting import length_class
from magicdec.simulation.jobs import Job
from magicdec.simulation.replica import SimulatedReplica


@dataclass(frozen=True, slots=True)
class Latency:
    """Of seconds; NaN where nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        if not seconds:
            return cls(math.nan, math.nan, math.nan, math.nan)
        shares = np.percentile(seconds, (50, 90, 99))
        return cls(float(np.mean(seconds)), *(float(value) for value in shares))


@dataclass(frozen=True, slots=True)
class ClassLatency:
    """Prompts of 2^c to 2^(c+1) - 1 tokens; of the shortest class, all shorter ones too."""

    length_class: int
    num_requests: int
    first_token: Latency  # since the arrival at the router


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """`imbalance` is the busiest replica's time over the mean one's: 1 is level."""

    policy: str
    drafts: str
    num_replicas: int
    num_finished: int
    num_refused: int
    duration_s: float  # from the first arrival to the last token
    output_tokens_per_s: float
    requests_per_s: float
    first_token: Latency
    first_token_by_class: tuple[ClassLatency, ...]
    token_latency: Latency  # a request's mean time between tokens
    cached_share: float  # of the prompt tokens of finished requests
    num_preemptions: int
    busy_share: float  # of the replicas' time
    imbalance: float
    mean_draft_length: float  # of a decode row's round
    tokens_per_row: float  # of a decode row's round, recovered or bonus token included


def summarize(
    policy: str,
    drafts: str,
    finished: Sequence[Job],
    num_refused: int,
    replicas: Sequence[SimulatedReplica],
) -> SimulationResult:
    """`finished`: jobs with all their times."""
    start = min((job.arrived_s for job in finished), default=0.0)
    duration = max((job.finished_s for job in finished), default=start) - start
    waits = [job.first_token_s - job.arrived_s for job in finished]
    prompts = sum(job.trace.num_prompt_tokens for job in finished)
    outputs = sum(job.trace.num_output_tokens for job in finished)
    busy = [replica.busy_s for replica in replicas]
    mean_busy = sum(busy) / len(busy)
    row_rounds = sum(replica.num_row_rounds for replica in replicas)
    return SimulationResult(
        policy=policy,
        drafts=drafts,
        num_replicas=len(replicas),
        num_finished=len(finished),
        num_refused=num_refused,
        duration_s=duration,
        output_tokens_per_s=_quotient(outputs, duration),
        requests_per_s=_quotient(len(finished), duration),
        first_token=Latency.of(waits),
        first_token_by_class=_by_class(finished, waits),
        token_latency=Latency.of([_token_latency(j) for j in finished if _has_gaps(j)]),
        cached_share=_quotient(sum(job.num_cached_tokens or 0 for job in finished), prompts),
        num_preemptions=sum(replica.num_preemptions for replica in replicas),
        busy_share=_quotient(mean_busy, duration),
        imbalance=_quotient(max(busy), mean_busy),
        mean_draft_length=_quotient(sum(r.num_draft_tokens for r in replicas), row_rounds),
        tokens_per_row=_quotient(sum(r.num_decoded_tokens for r in replicas), row_rounds),
    )


def _by_class(finished: Sequence[Job], waits: Sequence[float]) -> tuple[ClassLatency, ...]:
    classes: dict[int, list[float]] = {}
    for job, wait in zip(finished, waits, strict=True):
        classes.setdefault(length_class(job.trace.num_prompt_tokens), []).append(wait)
    return tuple(
        ClassLatency(length, len(classes[length]), Latency.of(classes[length]))
        for length in sorted(classes)
    )


def _has_gaps(job: Job) -> bool:
    return job.trace.num_output_tokens > 1


def _token_latency(job: Job) -> float:
    return (job.finished_s - job.first_token_s) / (job.trace.num_output_tokens - 1)


def _quotient(value: float, by: float) -> float:
    return value / by if by > 0 else math.nan
