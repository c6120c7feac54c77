"""Markdown of the router benchmark's results: by length class, then by arm."""

import math
from collections.abc import Iterable, Sequence
from statistics import median

from magicdec.routing.waiting import length_class
from tests.benchmarks.bench_router_records import (
    ARMS,
    ROUTER,
    SERVE,
    Record,
    Results,
    first_token_times,
    makespan_s,
    quantile,
)

LEAST_RATE_RATIO = 0.98  # of tokens a second

_NOTE = """Time to first token in seconds, from the moment that a request was to be sent; a request
without one counts as infinite. Quantiles are over all repetitions together; behind a ratio stand
the least and the greatest of single repetitions.
"""


def render(results: Results) -> str:
    records = results.records
    parts = [_header(results), _NOTE, class_table(records), "", arm_table(results), ""]
    return "\n".join([*parts, verdict(records), *_errors(records), ""])


def class_table(records: Sequence[Record]) -> str:
    lines = [
        "| prompt tokens | requests | p50 router | p50 Serve | ratio | p90 router | p90 Serve "
        "| ratio | cached router | cached Serve |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for name, rows in _classes(records):
        cells = [name, str(len({(r.repetition, r.request) for r in rows}))]
        for share in (0.5, 0.9):
            cells += [_seconds(first_token_times(_of(rows, arm)), share) for arm in ARMS]
            cells.append(_ratio(rows, share))
        cells += [_cached(_of(rows, arm)) for arm in ARMS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arm_table(results: Results) -> str:
    """`chosen`: requests that the router sent to a replica of its choice."""
    lines = [
        "| | tokens/s | makespan | cached tokens | failed | waited for a replica, p50 and p90 "
        "| a replica's share of prompt tokens | chosen |",
        "| --- " + "| ---: " * 7 + "|",
    ]
    for arm in ARMS:
        runs = _repetitions(_of(results.records, arm))
        if not runs:
            continue
        rows = [record for run in runs for record in run]
        waits = [math.inf if r.admitted_s is None else r.admitted_s for r in rows]
        chosen = sum(s["num_chosen"] for s in results.stats if s["arm"] == arm)
        cells = [
            arm,
            _spread([_rate(run) for run in runs], "{:.2f}"),
            _spread([makespan_s(run) for run in runs], "{:.0f} s"),
            _cached(rows),
            str(sum(r.error is not None for r in rows)),
            f"{_seconds(waits, 0.5)} and {_seconds(waits, 0.9)} s",
            _spread([_largest_share(run) for run in runs], "{:.0%}"),
            f"{chosen} of {len(rows)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(records: Sequence[Record]) -> str:
    """What must hold: p90 better in every class, and tokens/s."""
    if not all(_of(records, arm) for arm in ARMS):
        return "One arm only: nothing to compare."
    better = [
        _first_token(_of(rows, ROUTER), 0.9) < _first_token(_of(rows, SERVE), 0.9)
        for _, rows in _classes(records)
    ]
    rates = [median(map(_rate, _repetitions(_of(records, arm)))) for arm in ARMS]
    return (
        f"p90 better in {sum(better)} of {len(better)} length classes; tokens/s "
        f"{rates[0] / rates[1]:.3f} of Serve's (at least {LEAST_RATE_RATIO} is asked)."
    )


def _header(results: Results) -> str:
    run = results.run
    return "\n".join(
        [
            f"Machine: {run['machine']}, torch {run['torch']}, Ray {run['ray']}.\n",
            f"{run['model']} {run['dtype']}, {run['replicas']} replicas of {run['threads']} "
            f"thread(s); {run['requests']} requests of {run['prompt_tokens'][0]} to "
            f"{run['prompt_tokens'][1]} tokens and {run['output_tokens']} out, "
            f"{run['prefix_share']:.0%} with a common prefix of {run['prefix_tokens']}; arrivals "
            f"at {run['load']} of a capacity of {run['capacity']:.0f} tokens/s; seeds "
            f"{', '.join(map(str, run['seeds']))}, {run['repeat']} time(s) each.\n",
            "```",
            run["command"],
            "```\n",
        ]
    )


def _errors(records: Sequence[Record]) -> list[str]:
    found = sorted({f"{r.arm}: {r.error}" for r in records if r.error is not None})
    return ["", *(f"- {line}" for line in found[:10])] if found else []


def _classes(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The router's own length classes, shortest first."""
    numbers = sorted({record.length_class for record in records})
    classes = [[record for record in records if record.length_class == n] for n in numbers]
    names = [f"{2**n} to {2 ** (n + 1) - 1}" for n in numbers]
    if numbers[0] == length_class(1):  # all shorter ones are in it
        names[0] = f"to {2 ** (numbers[0] + 1) - 1}"
    return list(zip(names, classes, strict=True))


def _of(records: Iterable[Record], arm: str) -> list[Record]:
    return [record for record in records if record.arm == arm]


def _repetitions(records: Sequence[Record]) -> list[list[Record]]:
    numbers = sorted({record.repetition for record in records})
    return [[r for r in records if r.repetition == number] for number in numbers]


def _ratio(rows: Sequence[Record], share: float) -> str:
    """Router by Serve: all together, and the extremes of the repetitions that have both."""
    router, other = _of(rows, ROUTER), _of(rows, SERVE)
    if not router or not other:
        return "-"
    pairs = [[_of(run, arm) for arm in ARMS] for run in _repetitions(rows)]
    single = [_first_token(a, share) / _first_token(b, share) for a, b in pairs if a and b]
    whole = f"{_first_token(router, share) / _first_token(other, share):.2f}"
    return whole if len(single) < 2 else f"{whole} [{min(single):.2f} .. {max(single):.2f}]"


def _first_token(rows: Sequence[Record], share: float) -> float:
    return quantile(first_token_times(rows), share)


def _rate(run: Sequence[Record]) -> float:
    return sum(record.num_output_tokens for record in run) / makespan_s(run)


def _largest_share(run: Sequence[Record]) -> float:
    """Of the prompt tokens, the part of the replica that had most."""
    tokens: dict[str | None, int] = {}
    for record in run:
        tokens[record.replica] = tokens.get(record.replica, 0) + record.num_prompt_tokens
    return max(tokens.values()) / sum(tokens.values())


def _cached(rows: Sequence[Record]) -> str:
    """Cached prompt tokens a repetition, and their share of the prompts."""
    if not rows:
        return "-"
    cached, prompts = sum(r.cached_tokens for r in rows), sum(r.num_prompt_tokens for r in rows)
    return f"{cached / len(_repetitions(rows)):.0f} ({cached / prompts:.0%})"


def _seconds(values: Sequence[float], share: float) -> str:
    return f"{quantile(values, share):.2f}" if values else "-"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    if len(values) < 2:
        return middle
    return f"{middle} [{form.format(min(values))} .. {form.format(max(values))}]"
