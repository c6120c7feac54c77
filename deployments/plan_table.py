"""A plan as people read it, and as programs do. The table takes measured figures as well."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from magicdec.planning.figures import PointFigures
from magicdec.planning.plan import Plan, PlanRequest

_WIDE = 100  # columns from which headings are written out
ABSENT = "-"


def points_table(
    points: Sequence[PointFigures], width: int, *, with_drafter: bool = False
) -> Table:
    """One row a point, batches parted by a blank line; what is not known is a dash.

    Drafters have a column where they are asked for, shares where there are any.
    """
    wide = width >= _WIDE
    with_shares = any(p.shares is not None for p in points)
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    headings = ["batch", "context", "KV\npool", "plain\ntok/s", "spec.\ntok/s", "gain"]
    headings += ["draft\nlength", "budget"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    if with_drafter:
        table.add_column("drafter", no_wrap=True, vertical="bottom")
    if with_shares:
        names = ("weights", "KV", "compute", "overhead") if wide else ("wt", "KV", "cmp", "ovh")
        for name in names:
            table.add_column(f"{name}\n%", justify="right", no_wrap=True, vertical="bottom")
    previous = points[0].batch_size if points else 0
    for point in points:
        if point.batch_size != previous:
            table.add_row()
        previous = point.batch_size
        cells = _cells(point, with_drafter=with_drafter, with_shares=with_shares)
        table.add_row(*cells, style=None if point.plain_tokens_per_second else "dim")
    return table


def _cells(point: PointFigures, *, with_drafter: bool, with_shares: bool) -> list[str]:
    draft, shares = point.draft, point.shares
    drafts = draft is not None and draft.draft_length > 0
    cells = [
        f"{point.batch_size:,}",
        f"{point.context_len:,}",
        _kv(point.kv_share),
        rate_text(point.plain_tokens_per_second),
        rate_text(draft.tokens_per_second if draft is not None else None),
        ABSENT if point.speedup is None else f"{point.speedup:.2f}",
        ABSENT if draft is None else str(draft.draft_length),
        f"{draft.draft_budget:,}" if drafts and draft and draft.draft_budget else ABSENT,
    ]
    if with_drafter:
        cells.append(draft.drafter if drafts and draft and draft.drafter else ABSENT)
    if with_shares:
        parts = (
            (None,) * 4
            if shares is None
            else (shares.weights, shares.kv, shares.compute, shares.overhead)
        )
        cells += [ABSENT if part is None else f"{100 * part:.0f}" for part in parts]
    return cells


def _kv(share: float | None) -> str:
    if share is None:
        return ABSENT
    return f"{math.ceil(100 * share)}%" if share <= 1.0 else "no"


def rate_text(tokens_per_second: float | None) -> str:
    """With a decimal below 100."""
    if tokens_per_second is None:
        return ABSENT
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f}"


def print_plan(plan: Plan, notes: Sequence[str], dtype: str, console: Console) -> None:
    """What is assumed, the table, and where the bottleneck turns."""
    request = plan.request
    ranks = f"{request.num_ranks} x " if request.num_ranks > 1 else ""
    console.print(f"[bold]{request.model.name}[/bold] on {ranks}{request.device.name}, {dtype}\n")
    print_facts(_assumptions(plan), console)
    console.print()
    several = len({setting.drafter for setting in request.settings}) > 1
    console.print(points_table(plan.points(), console.width, with_drafter=several))
    console.print()
    print_facts([*_turns(plan), *(("note", note) for note in notes)], console)


def print_facts(facts: Sequence[tuple[str, str]], console: Console) -> None:
    """A name and a sentence a row."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(name, text)
    console.print(table)


def _assumptions(plan: Plan) -> list[tuple[str, str]]:
    request = plan.request
    shape, device, ranks = request.model.geometry, request.device, request.num_ranks
    fixed = 1e3 * device.fixed_seconds(shape.num_layers, ranks)
    return [
        (
            "model",
            f"{shape.num_layers} layers, {shape.num_query_heads} query and {shape.num_kv_heads} KV "
            f"heads of {shape.head_dim}; a step reads {shape.weight_bytes / 1e9:,.1f} GB of weights"
            f" and {shape.kv_bytes_per_token / 1024:,.0f} KiB of KV a token",
        ),
        (
            "device",
            f"{device.bandwidth / 1e9:,.0f} GB/s, {device.arithmetic / 1e12:,.3g} TFLOP/s, "
            f"{device.usable_bytes / 1e9:,.1f} GB for weights and KV{' each' if ranks > 1 else ''} "
            f"({device.origin})",
        ),
        ("overhead", f"{fixed:.2f} ms a forward ({device.overhead_origin})"),
        ("drafts", _drafts(request)),
        ("accepted", _accepted(request)),
    ]


def _drafts(request: PlanRequest) -> str:
    names = list(dict.fromkeys(setting.drafter for setting in request.settings))
    return (
        f"{', '.join(names)}; at most {request.max_draft_length} tokens a round, over at most "
        f"{request.limits.max_view_share:.0%} of the context"
    )


def _accepted(request: PlanRequest) -> str:
    lengths = request.context_lens
    given = [setting.acceptance for setting in request.settings]
    found = [setting.accepts(c) for setting in request.settings for c in lengths]
    low, high = min(found), max(found)
    span = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    if None not in given:
        smallest = len(set(given)) == 1 and len(given) > 1
        rest = ": the same for all budgets, so the smallest wins" if smallest else ""
        return f"{span} of the drafted tokens, as given{rest}"
    return f"{span} of the drafted tokens, by budget and context: expected from published figures"


def _turns(plan: Plan) -> list[tuple[str, str]]:
    """Where the bottleneck moves."""
    request, memory = plan.request, plan.memory
    columns = "% of a plain step's time: reading weights, reading KV, arithmetic, overhead"
    fitting = ", ".join(f"{memory.max_batch(c):,} of {c:,}" for c in request.context_lens)
    overtaking = ", ".join(
        f"{_tokens(plan.kv_overtakes(b))} (batch {b:,})" for b in request.batch_sizes
    )
    facts = [
        ("gain", "spec. over plain; the paper's measured gains are 6 to 22% below planned ones"),
        ("shares", columns),
        ("KV pool", f"{memory.capacity_tokens:,} tokens; sequences at once: {fitting}"),
        ("KV > weights", f"a plain step reads more KV than weights above {overtaking} tokens"),
    ]
    critical = plan.critical()
    if critical is None:
        return facts
    if math.isinf(critical.context_len):
        return [*facts, ("critical", "drafts never gain as the batch grows")]
    setting = critical.setting
    return [
        *facts,
        (
            "critical",
            f"{_tokens(critical.context_len)} tokens: from there on drafts gain, and the more the "
            f"larger the batch ({setting.drafter}, {critical.draft_length} a round over "
            f"{setting.draft_budget:,}; limit of large batches)",
        ),
    ]


def _tokens(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:,.0f}"


def plan_document(plan: Plan, notes: Sequence[str]) -> dict[str, Any]:
    """The same for programs. Seconds, bytes and tokens; what is infinite is null."""
    request, memory = plan.request, plan.memory
    critical = plan.critical()
    return {
        "model": asdict(request.model),
        "device": asdict(request.device),
        "tensor_parallel_size": request.num_ranks,
        "points": [{**asdict(p), "speedup": p.speedup} for p in plan.points()],
        "kv_pool": {
            "bytes_per_rank": memory.kv_pool_bytes,
            "tokens": memory.capacity_tokens,
            "sequences": {str(c): memory.max_batch(c) for c in request.context_lens},
        },
        "kv_overtakes_weights": {
            str(b): _finite(plan.kv_overtakes(b)) for b in request.batch_sizes
        },
        "critical": None
        if critical is None
        else {**asdict(critical), "context_len": _finite(critical.context_len)},
        "notes": list(notes),
    }


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
