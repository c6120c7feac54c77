"""What a replica tells the router twice a second, and what of it cannot be true."""

from dataclasses import dataclass

from magicdec.stats import EngineLoad

MAX_TOKENS = 2**40  # no pool, prompt or answer holds more
MAX_SEQS = 2**20


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """One that has reached the replica and not ended. Tokens of earlier replicas are output too."""

    request_id: str
    num_output_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One that ended with an answer since the last report; those given up are in no list."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica as it is now. `live` is complete, so that a router which knows nothing knows
    everything after one report of each; `number` grows, so that a late one is told from a new one.

    `prefixes`: what prompts it served lately begin with (prefix_affinity.prefix_hashes), oldest
    first; only sent when the router had not known the replica.
    """

    number: int
    load: EngineLoad
    max_num_seqs: int
    max_batch_tokens: int  # what one step computes at most
    live: tuple[LiveRequest, ...] = ()
    finished: tuple[FinishedRequest, ...] = ()
    prefixes: tuple[tuple[int, ...], ...] = ()
    draining: bool = False  # it finishes what it has and takes nothing new


def find_flaw(report: ReplicaReport) -> str | None:
    """What cannot be true of it, naming field, value and limit; None: nothing."""
    load = report.load
    counts = {
        "number": (report.number, 0, MAX_TOKENS),
        "num_running": (load.num_running, 0, MAX_SEQS),
        "num_waiting": (load.num_waiting, 0, MAX_SEQS),
        "total_kv_tokens": (load.total_kv_tokens, 1, MAX_TOKENS),
        "free_kv_tokens": (load.free_kv_tokens, 0, load.total_kv_tokens),
        "num_prefill_tokens": (load.num_prefill_tokens, 0, MAX_TOKENS),
        "num_waiting_tokens": (load.num_waiting_tokens, 0, MAX_TOKENS),
        "max_num_seqs": (report.max_num_seqs, 1, MAX_SEQS),
        "max_batch_tokens": (report.max_batch_tokens, 1, MAX_TOKENS),
    }
    for name, (value, low, high) in counts.items():
        if not _is_count(value, low, high):
            return f"{name} must be a whole number from {low} to {high}, got {value!r}"
    requests: tuple[LiveRequest | FinishedRequest, ...] = (*report.live, *report.finished)
    for request in requests:
        if not _is_count(request.max_tokens, 1, MAX_TOKENS):
            return f"max_tokens of {request.request_id} is {request.max_tokens!r}"
        if not _is_count(request.num_output_tokens, 0, request.max_tokens):
            return f"num_output_tokens of {request.request_id} is {request.num_output_tokens!r}"
    for ended in report.finished:
        if not _is_count(ended.num_prompt_tokens, 0, MAX_TOKENS):
            return f"num_prompt_tokens of {ended.request_id} is {ended.num_prompt_tokens!r}"
    return None


def _is_count(value: object, low: int, high: object) -> bool:
    """Reports come from other processes: a float, NaN or not, is no count there."""
    return isinstance(value, int) and isinstance(high, int) and low <= value <= high
