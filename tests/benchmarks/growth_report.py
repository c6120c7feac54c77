"""Tokens a second and memory over context and batch: Markdown tables and a picture of both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from magicdec.deployments.live_bench import PLAIN
from tests.benchmarks.policy_arms import ADAPTIVE

# One hue, the darker the larger the batch: batches have an order.
_BLUES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")

Record = dict[str, Any]


def render(records: Sequence[Record]) -> str:
    """Raises ValueError where no point was measured."""
    batches, contexts, points = _grid(records)
    facts = next(r["run"] for r in records if "run" in r)
    lines = [f"{name}: {value}" for name, value in facts.items() if name != "batch"]
    head = "| ".join(f"{context:,} tokens " for context in contexts)
    for title, cell in (
        ("tokens/s plain, adaptive; their ratio", _rate_cell),
        ("GiB needed", lambda point: f"{_needed_gib(point):.1f}"),
    ):
        lines += ["", f"| {title} | {head}|", "| --- " * (len(contexts) + 1) + "|"]
        for batch in batches:
            cells = [
                cell(points[batch, c]) if (batch, c) in points else "not run" for c in contexts
            ]
            lines.append(f"| batch {batch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Record], path: Path) -> None:
    batches, contexts, points = _grid(records)
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained")
    rates, memory = figure.subplots(1, 2)
    for i, batch in enumerate(batches):
        colour = _BLUES[i * (len(_BLUES) - 1) // max(len(batches) - 1, 1)]
        found = [points[batch, c] for c in contexts if (batch, c) in points]
        lens = [p["context"] for p in found]
        rates.plot(lens, [p[PLAIN] for p in found], "--", color=colour, linewidth=1.2)
        rates.plot(lens, [p[ADAPTIVE] for p in found], "o-", color=colour, markersize=4)
        needed = [_needed_gib(p) for p in found]
        memory.plot(lens, needed, "o-", color=colour, markersize=4)
        for axes, last in ((rates, found[-1][ADAPTIVE]), (memory, needed[-1])):
            place = (lens[-1], last)
            axes.annotate(f"  {batch}", place, color=colour, va="center", fontsize=8)
    rates.set_yscale("log", base=2)
    rates.plot([], [], "o-", color="#444444", markersize=4, label="adaptive")
    rates.plot([], [], "--", color="#444444", linewidth=1.2, label="plain")
    rates.legend(frameon=False)
    _name(rates, contexts, "decoded tokens/s, all sequences")
    _name(memory, contexts, "GiB needed: model, process and the batch's KV")
    memory.set_ylim(bottom=0)
    figure.suptitle("by context, a curve a batch size", fontsize=11)
    figure.savefig(path)


def _name(axes: Axes, contexts: Sequence[int], what: str) -> None:
    axes.set_title(what, fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of context")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _rate_cell(point: Record) -> str:
    spread = f"{point['ratio']:.2f} [{point['lowest']:.2f} .. {point['highest']:.2f}]"
    return f"{point[PLAIN]:.0f}, {point[ADAPTIVE]:.0f}; {spread}"


def _needed_gib(point: Record) -> float:
    return float(point["held_bytes"] - point["unused_kv_bytes"]) / (1 << 30)


def _grid(
    records: Sequence[Record],
) -> tuple[list[int], list[int], dict[tuple[int, int], Record]]:
    """Batch sizes, contexts, and the points by both; of one measured twice, the last."""
    points = {(r["batch"], r["context"]): r for r in records if "context" in r}
    if not points:
        raise ValueError("no point was measured")
    batches, contexts = (sorted(set(axis)) for axis in zip(*points, strict=True))
    return batches, contexts, points
