"""Plan and measurement of a bench side by side, as people read it and as programs do."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from magicdec.deployments.bench_points import BenchReport, MeasuredPoint
from magicdec.deployments.live_bench import PLAIN
from magicdec.deployments.plan_table import ABSENT, print_facts, rate_text
from magicdec.draft_choice import TRAITS
from magicdec.planning.figures import PointFigures

_WIDE = 118  # columns from which a draft is one line
_ALIKE = 0.1  # a difference that needs no words
_SHORT = 9  # characters that need no second line
_HEADINGS = (
    *("batch", "context", "plain\ntok/s\nplan", "\n\nhere", "spec.\ntok/s\nplan", "\n\nhere"),
    *("gain\n\nplan", "\n\nhere", "draft\n\nplan", "mostly\n\nhere", "acc.\n\nhere"),
    "gain of\npairs\nhere",
)
_LEFT = (8, 9)  # columns of words


def print_report(report: BenchReport, console: Console) -> None:
    """The table, and what to know of it."""
    console.print(
        f"[bold]{report.model}[/bold] on {report.device.name}, {report.config.model.dtype}, "
        f"{report.attention}, {_counted(report.num_threads, 'thread')}\n"
    )
    console.print(report_table(report, console.width))
    console.print()
    print_facts([*_facts(report), *_differences(report)], console)


def report_table(report: BenchReport, width: int) -> Table:
    """One row a point, batches parted by a blank line."""
    wide = width >= _WIDE
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    for i, heading in enumerate(_HEADINGS):
        justify: Any = "left" if i in _LEFT else "right"
        table.add_column(heading, justify=justify, no_wrap=True, vertical="bottom")
    previous = report.planned[0].batch_size if report.planned else 0
    for planned, measured in zip(report.planned, report.measured, strict=True):
        if planned.batch_size != previous:
            table.add_row()
        previous = planned.batch_size
        table.add_row(*_cells(planned, measured, wide=wide))
    return table


def _cells(planned: PointFigures, measured: MeasuredPoint, *, wide: bool) -> list[str]:
    draft, chosen, gains = planned.draft, measured.chosen, measured.speedups
    return [
        f"{planned.batch_size:,}",
        f"{planned.context_len:,}",
        rate_text(planned.plain_tokens_per_second),
        rate_text(measured.plain_tokens_per_second),
        rate_text(None if draft is None else draft.tokens_per_second),
        rate_text(measured.speculative_tokens_per_second),
        ABSENT if planned.speedup is None else f"{planned.speedup:.2f}",
        f"{measured.speedup:.2f}",
        *(_folded(text, wide=wide) for text in (_planned_draft(planned), draft_text(chosen))),
        ABSENT if measured.acceptance is None else f"{measured.acceptance:.2f}",
        f"{min(gains):.2f}-{max(gains):.2f}",
    ]


def _folded(draft: str, *, wide: bool) -> str:
    """The drafter above the rest where a line has no room for both."""
    return draft if wide or len(draft) <= _SHORT else draft.replace(" ", "\n", 1)


def _planned_draft(point: PointFigures) -> str:
    draft = point.draft
    if draft is None:
        return ABSENT
    if draft.drafter is None:
        return PLAIN
    return draft_text(f"{draft.drafter} {draft.draft_length} x {draft.draft_budget or 0}")


def draft_text(plan: str) -> str:
    """A round's name, as live_bench.Round has it, without the budget of who reads no view."""
    drafter = plan.partition(" ")[0]
    if plan == PLAIN or TRAITS[drafter].reads_view:
        return plan
    return plan.partition(" x ")[0]


def _facts(report: BenchReport) -> list[tuple[str, str]]:
    device, speculation = report.device, report.config.speculation
    pairs = sorted({len(point.pairs) for point in report.measured})
    counted = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    adaptive = speculation.adaptive
    names = ", ".join(adaptive.drafters) if adaptive is not None else speculation.drafter
    return [
        (
            "plan",
            f"{device.bandwidth / 1e9:,.1f} GB/s, {device.arithmetic / 1e12:,.3g} TFLOP/s "
            f"({device.origin}); acceptance as published",
        ),
        (
            "here",
            f"medians of {counted} pairs of segments on the same prompts and seeds; a gain is the "
            "median of the pairs' gains",
        ),
        ("drafts", f"{names}; tokens a round x KV positions read"),
    ]


def _differences(report: BenchReport) -> list[tuple[str, str]]:
    """Where the plan is off by more than a tenth: by how much, and what it leaves out."""
    compared = list(zip(report.planned, report.measured, strict=True))
    plain = [
        here.plain_tokens_per_second / plan.plain_tokens_per_second
        for plan, here in compared
        if plan.plain_tokens_per_second is not None
    ]
    gains = [here.speedup / plan.speedup for plan, here in compared if plan.speedup is not None]
    off = [
        f"{name} {_span(ratios)} of the planned"
        for name, ratios in (("plain rate", plain), ("gain", gains))
        if any(abs(ratio - 1.0) > _ALIKE for ratio in ratios)
    ]
    if not off:
        return []
    why = (
        "A CPU's roofline is coarse: caches, threads and sampling are not in it"
        if report.on_cpu
        else "The plan leaves out sampling, and takes launches as replayed graphs"
    )
    return [("differs", f"{', '.join(off)}. {why}.")]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _span(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def report_document(report: BenchReport) -> dict[str, Any]:
    """The same for programs. Seconds, bytes and tokens; what is not known is null."""
    return {
        "model": report.model,
        "dtype": report.config.model.dtype,
        "attention": report.attention,
        "num_threads": report.num_threads,
        "device": asdict(report.device),
        "points": [
            {
                "batch_size": planned.batch_size,
                "context_len": planned.context_len,
                "plan": {**asdict(planned), "speedup": planned.speedup},
                "here": _measured_document(measured),
            }
            for planned, measured in zip(report.planned, report.measured, strict=True)
        ],
        "notes": [f"{name}: {text}" for name, text in _differences(report)],
    }


def _measured_document(point: MeasuredPoint) -> dict[str, Any]:
    return {
        "plain_tokens_per_second": point.plain_tokens_per_second,
        "speculative_tokens_per_second": point.speculative_tokens_per_second,
        "speedup": point.speedup,
        "speedups": point.speedups,
        "chosen": point.chosen,
        "choices": point.choices,
        "acceptance": point.acceptance,
    }
