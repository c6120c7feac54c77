"""A request in a simulated replica, and how far rounds bring its answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from magicdec.simulation.trace import TraceRequest


@dataclass(slots=True, eq=False)
class Job:
    """`emitted` is as of the end of the last rounds."""

    number: int  # by arrival at the router
    trace: TraceRequest
    arrived_s: float  # at the router
    runs: bytes = b""  # AcceptanceLaw.runs, while it decodes
    emitted: int = 0
    num_left: int = 0  # of its context to prefill
    num_cached_tokens: int | None = None  # None: never admitted
    first_token_s: float = math.nan
    finished_s: float = math.nan

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    @property
    def num_context_tokens(self) -> int:
        return self.trace.num_prompt_tokens + self.emitted

    @property
    def num_tokens_lost(self) -> int:
        """To be computed again, should it be preempted; its prefix is found again."""
        computed = self.num_context_tokens - self.num_left
        return max(computed - self.trace.num_prefix_tokens, 0)


def answer_paths(
    rows: Sequence[Job], draft_lengths: Sequence[int], most_rounds: int
) -> tuple[int, list[Sequence[int]]]:
    """The rounds until the first row has its answer, `most_rounds` at most, and each row's output
    tokens before them, after one, after two and so on. Every row must have some to come.

    A round emits the drafts accepted in a row and the token after them, up to the answer's end.
    """
    paths: list[Sequence[int]] = []
    for job, length in zip(rows, draft_lengths, strict=True):
        at, end, runs = job.emitted, job.trace.num_output_tokens, job.runs
        if length == 0:
            paths.append(range(at, min(at + most_rounds, end) + 1))
        else:
            path = [at]
            while at < end and len(path) <= most_rounds:
                at += min(runs[at], length) + 1
                path.append(min(at, end))
            paths.append(path)
        most_rounds = min(most_rounds, len(paths[-1]) - 1)
    return most_rounds, paths
