"""A plan as a picture: what drafts gain, and where the time of a plain step goes, by context."""

import math
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from magicdec.planning.plan import Plan

_STEPS = 48  # contexts of a curve
# Colours that people who tell few apart can tell apart (Okabe and Ito).
_SHARES = (
    ("weights", "#0072B2"),
    ("kv", "#E69F00"),
    ("compute", "#009E73"),
    ("overhead", "#BBBBBB"),
)
_NAMES = {"weights": "reading weights", "kv": "reading KV"}
_STYLE: dict[str, Any] = {"color": "#444444", "linewidth": 1.0, "linestyle": (0, (4, 3))}


def draw_plan(plan: Plan, path: Path) -> None:
    """Two panels side by side; the suffix says which format. Raises OSError."""
    figure = Figure(figsize=(12.0, 5.0), dpi=150, layout="constrained")
    gain, shares = figure.subplots(1, 2)
    contexts = _contexts(plan)
    request = plan.request
    ranks = f"{request.num_ranks} x " if request.num_ranks > 1 else ""
    figure.suptitle(f"{request.model.name} on {ranks}{request.device.name}", fontweight="bold")
    _draw_gain(gain, plan, contexts)
    _draw_shares(shares, plan, contexts)
    for axes in (gain, shares):
        _context_axis(axes, contexts)
    figure.savefig(path)


def _contexts(plan: Plan) -> list[int]:
    """From the shortest asked for to the longest, evenly by ratio; of one, around it."""
    asked = plan.request.context_lens
    low, high = min(asked), max(asked)
    if low == high:
        low, high = max(low // 8, 1), high * 8
    high = max(min(high, plan.request.model.max_context or high), low + 1)
    ratio = (high / low) ** (1.0 / (_STEPS - 1))
    return sorted({round(low * ratio**step) for step in range(_STEPS)})


def _draw_gain(axes: Axes, plan: Plan, contexts: list[int]) -> None:
    batches = plan.request.batch_sizes
    colours = colormaps["viridis"]
    highest = 1.0
    for i, batch_size in enumerate(batches):
        gains = [plan.point(batch_size, context).speedup for context in contexts]
        known = [(c, g) for c, g in zip(contexts, gains, strict=True) if g is not None]
        if not known:
            continue
        colour = colours(0.9 * (1.0 - i / max(len(batches) - 1, 1)))
        axes.plot(*zip(*known, strict=True), color=colour, linewidth=2, label=f"{batch_size:,}")
        if len(known) < len(contexts):  # memory ends here
            axes.plot(*known[-1], marker="|", markersize=12, markeredgewidth=2, color=colour)
        highest = max(highest, *(g for _, g in known))
    axes.axhline(1.0, **_STYLE)
    critical = plan.critical()
    if critical is not None and contexts[0] < critical.context_len < contexts[-1]:
        axes.axvline(critical.context_len, **_STYLE)
        axes.annotate(
            "critical length", (critical.context_len, 0.98), xytext=(4, 0), rotation=90,
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=8,
        )  # fmt: skip
    axes.set_ylim(0.9, 1.06 * highest)
    axes.set_ylabel("tokens/s over plain decoding's")
    axes.set_title("Gain of the best draft", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(
        title="batch (bar: memory is full)", loc="upper center", bbox_to_anchor=(0.5, -0.14),
        ncols=6, frameon=False, fontsize=9, title_fontsize=9,
    )  # fmt: skip


def _draw_shares(axes: Axes, plan: Plan, contexts: list[int]) -> None:
    batch_size = _middle_batch(plan, contexts)
    shares = [plan.rounds.shares(batch_size, context) for context in contexts]
    below = [0.0] * len(contexts)
    for name, colour in _SHARES:
        parts = {"weights": [s.weights for s in shares], "kv": [s.kv for s in shares]}
        parts |= {"compute": [s.compute for s in shares], "overhead": [s.overhead for s in shares]}
        above = [a + b for a, b in zip(below, parts[name], strict=True)]
        label = _NAMES.get(name, name)
        axes.fill_between(contexts, below, above, color=colour, label=label, linewidth=0)
        below = above
    crossing = plan.kv_overtakes(batch_size)
    if contexts[0] < crossing < contexts[-1]:
        axes.axvline(crossing, **_STYLE)
        axes.annotate(
            "KV overtakes weights", (crossing, 0.98), xytext=(4, 0), rotation=90,
            textcoords="offset points", va="top", fontsize=8,
        )  # fmt: skip
    full = plan.memory.max_context(batch_size)
    if full < contexts[-1]:
        start = max(full, contexts[0])
        axes.axvspan(
            start, contexts[-1], facecolor=(1, 1, 1, 0.65), hatch="///", edgecolor="#777777",
            linewidth=0, label="does not fit",
        )  # fmt: skip
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_ylabel("share of a plain step's time")
    axes.set_title(f"Where a plain step spends its time, batch {batch_size:,}", fontsize=11)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, frameon=False, fontsize=9,
        columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def _middle_batch(plan: Plan, contexts: list[int]) -> int:
    """In the middle of the batches that fit in the middle of the contexts; else the smallest."""
    middle = math.sqrt(contexts[0] * contexts[-1])
    batches = sorted(plan.request.batch_sizes)
    fitting = [b for b in batches if plan.memory.max_context(b) >= middle]
    return fitting[len(fitting) // 2] if fitting else batches[0]


def _context_axis(axes: Axes, contexts: list[int]) -> None:
    low, high = contexts[0], contexts[-1]
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    powers = [2**n for n in range(24) if low <= 2**n <= high]
    axes.xaxis.set_major_locator(FixedLocator(powers if len(powers) > 1 else [low, high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel("context, tokens")


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,.0f}"
