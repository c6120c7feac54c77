"""What the router benchmark wrote down: one line a request, and lines about the run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from magicdec.routing.waiting import length_class
from magicdec.simulation.trace import TraceRequest
from tests.benchmarks.bench_router_client import Answer

ROUTER, SERVE = "router", "serve"
ARMS = (ROUTER, SERVE)


@dataclass(frozen=True, slots=True)
class Repetition:
    """One run of one trace through each arm."""

    number: int
    seed: int


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Seconds: `arrival_s` from the start of its repetition, the others from the
    moment that it was to be sent. `admitted_s` is when `replica` had it."""

    arm: str
    repetition: int
    seed: int
    request: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_id: str | None
    sent_s: float
    admitted_s: float | None
    ttft_s: float | None  # None: no token came
    total_s: float
    cached_tokens: int
    replica: str | None
    error: str | None

    @property
    def length_class(self) -> int:
        """The router's own: powers of two."""
        return length_class(self.num_prompt_tokens)


def make_records(
    arm: str,
    repetition: Repetition,
    requests: Sequence[TraceRequest],
    answers: Sequence[Answer],
    arrivals: dict[int, tuple[str, float]],
) -> list[Record]:
    """`arrivals`: request number -> replica, and when it had it."""
    records = []
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        replica, admitted = arrivals.get(i, (None, None))
        records.append(
            Record(
                arm=arm,
                repetition=repetition.number,
                seed=repetition.seed,
                request=i,
                arrival_s=round(request.arrival_s, 4),
                num_prompt_tokens=request.num_prompt_tokens,
                num_output_tokens=answer.num_output_tokens,
                prefix_id=request.prefix_id,
                sent_s=round(answer.sent - answer.due, 4),
                admitted_s=_since(answer.due, admitted),
                ttft_s=_since(answer.due, answer.first),
                total_s=round(answer.done - answer.due, 4),
                cached_tokens=answer.cached_tokens,
                replica=replica,
                error=answer.error,
            )
        )
    return records


@dataclass(slots=True)
class Results:
    """`run`: machine, shapes and command. `stats`: of the router, by arm and repetition."""

    run: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises ValueError for a file with a line that is none of these."""
        results = cls({})
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                results._keep(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a result ({error})") from error
        return results

    def append(self, path: Path, records: Sequence[Record], stats: dict[str, Any]) -> None:
        """At the end of an arm: an interrupted run leaves what it has measured."""
        rows: list[dict[str, Any]] = [asdict(record) for record in records]
        rows.append({"stats": stats})
        for row in rows:
            self._keep(row)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _keep(self, row: dict[str, Any]) -> None:
        if "run" in row:
            self.run = row["run"]
        elif "stats" in row:
            self.stats.append(row["stats"])
        else:
            self.records.append(Record(**row))


def begin(path: Path, run: dict[str, Any]) -> Results:
    """A new file. Raises FileExistsError: what was measured is not written over."""
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"run": run}) + "\n")
    return Results(run)


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed: always one that was measured,
    and infinity where too many never came."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def first_token_times(records: Iterable[Record]) -> list[float]:
    """Seconds; infinity for a request without a first token."""
    return [math.inf if r.ttft_s is None else r.ttft_s for r in records]


def makespan_s(records: Sequence[Record]) -> float:
    """From the first arrival of one repetition to its last token."""
    first = min(record.arrival_s for record in records)
    return max(record.arrival_s + record.total_s for record in records) - first


def _since(due: float, at: float | None) -> float | None:
    return None if at is None else round(at - due, 4)
