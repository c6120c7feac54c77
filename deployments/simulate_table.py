"""Simulated runs as people read them, and as programs do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from magicdec.simulation.result import Latency, SimulationResult

_CLASSES_ABREAST = 4
_COLUMNS = (  # headings and widths, 99 columns together
    ("draft", 8),
    ("tok/s", 9),
    ("first\np50 s", 5),
    ("token\np90 s", 5),
    ("\np99 s", 5),
    ("next\np50 ms", 6),
    ("token\np90 ms", 6),
    ("\np99 ms", 6),
    ("cached\n%", 6),
    ("\nrefused", 7),
    ("pre-\nempted", 6),
    ("busy\n%", 4),
    ("draft\nlength", 6),
    ("took\ns", 5),
)
_FIRST_CLASS = 8  # the shortest, which holds all shorter prompts too


@dataclass(frozen=True, slots=True)
class Run:
    """One policy and draft, and how long the simulator took."""

    result: SimulationResult
    simulator_s: float


def print_runs(runs: Sequence[Run], heading: str, console: Console) -> None:
    """One row a policy and draft, then their first tokens by length of prompt."""
    console.print(heading, highlight=False)
    _print_blocks(runs, _COLUMNS, _cells, console)
    classes = sorted({c.length_class for r in runs for c in r.result.first_token_by_class})
    for first in range(0, len(classes), _CLASSES_ABREAST):
        some = classes[first : first + _CLASSES_ABREAST]
        columns = [("draft", 8), *((f"{_tokens(c)}\np50/p90/p99 s", 19) for c in some)]
        console.print("\nFirst token by length of prompt", style="bold")
        _print_blocks(runs, columns, partial(_class_cells, some), console)


def runs_document(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What was not measured is null."""
    return [_plain({**asdict(run.result), "simulator_s": run.simulator_s}) for run in runs]


def _print_blocks(
    runs: Sequence[Run],
    columns: Sequence[tuple[str, int]],
    cells: Callable[[Run], Sequence[str]],
    console: Console,
) -> None:
    """One table: the headings once, and each policy's name above its rows."""
    console.print(_table(columns, with_header=True))
    for policy, group in groupby(runs, key=lambda run: run.result.policy):
        console.print(policy, style="cyan", highlight=False)
        table = _table(columns, with_header=False)
        for run in group:
            table.add_row(*cells(run))
        console.print(table)


def _cells(run: Run) -> list[str]:
    result = run.result
    return [
        result.drafts,
        _rate(result.output_tokens_per_s),
        *_shares(result.first_token),
        *_shares(result.token_latency, 1000.0),
        _percent(result.cached_share),
        f"{result.num_refused:,}",
        f"{result.num_preemptions:,}",
        _percent(result.busy_share),
        _number(result.mean_draft_length),
        _number(run.simulator_s),
    ]


def _class_cells(classes: Sequence[int], run: Run) -> list[str]:
    by_class = {c.length_class: c.first_token for c in run.result.first_token_by_class}
    shares = ["/".join(_shares(by_class[c])) if c in by_class else "-" for c in classes]
    return [run.result.drafts, *shares]


def _table(columns: Sequence[tuple[str, int]], *, with_header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", show_header=with_header)
    for i, (heading, width) in enumerate(columns):
        justify: JustifyMethod = "left" if i == 0 else "right"
        table.add_column(heading, justify=justify, width=width, no_wrap=True, vertical="bottom")
    return table


def _tokens(length_class: int) -> str:
    if length_class <= _FIRST_CLASS:
        return f"up to {(2 << length_class) - 1:,}"
    return f"{1 << length_class:,}-{(2 << length_class) - 1:,}"


def _shares(latency: Latency, scale: float = 1.0) -> tuple[str, str, str]:
    p50, p90, p99 = latency.p50, latency.p90, latency.p99
    return _number(scale * p50), _number(scale * p90), _number(scale * p99)


def _number(value: float) -> str:
    """Three digits or so."""
    if math.isnan(value):
        return "-"
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _rate(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
