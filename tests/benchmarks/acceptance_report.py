"""Markdown of a results file: every cell that it holds, the ones that look bad included."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from magicdec.config import SelectionConfig
from tests.benchmarks.acceptance_cells import DRAFTERS, PLAIN, Cell, ResultsFile

_GROUP_FIELDS = ("block", "model", "dtype", "context", "num_tokens", "temperature", "prompts")
_TITLES = {
    "sampled": "Continuation and summary, sampled",
    "greedy": "Continuation and summary, greedy",
    "needle": "Needle",
    "long": "Long output, by position",
}
_INTRO = """# Acceptance

How many drafted tokens the target agrees with, by drafter, draft budget and task. Written by
`make bench BENCH=acceptance` (`tests/benchmarks/bench_acceptance.py`); prompts are windows of
public documents, listed by offset in `tests/benchmarks/acceptance_prompts.json`.

Under shared noise the emitted tokens are the plain run's whoever drafts, so all rows of a table are
judged on the same text. A drafted token is *examined* when every draft before it in its round was
accepted; acceptance is accepted / examined. Mean acceptance length counts the recovered or bonus
token. `top_k` is the upper bound, not for serving: it reads all keys to choose its view at every
step. Budgets count KV positions. `draft_model` over a window is not `streaming`: its K/V were
themselves computed under that window, which from the second layer on is another value.
"""
_DEFAULTS = asdict(SelectionConfig())
_NEEDLE_NOTE = """
Twenty facts stand at even depths of each context; a question repeats a fact's words up to its
six-digit value. Acceptance is over the answers that the plain model gets right, teacher-forced: a
draft is as long as an answer, so every position but the first, which comes from the prefill and is
no digit, is examined exactly once, on the plain answer's own tokens.
"""
_NEEDLE_END = """
A question repeats its fact word for word, so `ngram` finds the value by looking the question up:
its score says nothing about other retrieval.
"""
_LONG_NOTE = """
Acceptance by output position. `snapkv` is `recycled` with refresh off: both select after the
prompt, only `recycled` selects again.
"""
Row = tuple[Cell, dict[str, Any]]


def render(results: ResultsFile) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for cell, result in results.cells:
        groups.setdefault(tuple(cell[f] for f in _GROUP_FIELDS), []).append((cell, result))
    order = list(_TITLES)
    parts = [_INTRO, _runs(results.runs)]
    for key in sorted(groups, key=lambda k: (order.index(k[0]), k[1:])):
        parts.append(_group(groups[key]))
    parts.append(_texts(results.cells))
    parts.append(_all_cells(results.cells))
    return "\n".join(parts)


def _runs(runs: list[dict[str, Any]]) -> str:
    """Machines, then commands; several where a run was interrupted or added to."""
    machines = dict.fromkeys(f"{r['machine']}, torch {r['torch']}" for r in runs)
    commands = dict.fromkeys(r["command"] for r in runs)
    lines = [f"Machine: {machine}.\n" for machine in machines]
    return "\n".join([*lines, "```", *commands, "```", ""])


def _group(rows: list[Row]) -> str:
    cell = rows[0][0]
    block = cell["block"]
    drafts = sorted((r for r in rows if r[0]["drafter"] != PLAIN), key=lambda r: _order(r[0]))
    common, labels = _settings(drafts)
    lengths = sorted({c["draft_length"] for c, _ in drafts})
    caption = (
        f"{cell['model']}, {cell['dtype']}, {cell['context']:,} prompt tokens, "
        f"{cell['num_tokens']:,} generated, temperature {cell['temperature']}, "
        f"{cell['prompts']} prompts a task, draft length {', '.join(map(str, lengths))}"
    )
    defaults = f" Where a row says nothing else: {', '.join(common)}." if common else ""
    head = f"## {_TITLES[block]}\n\n{caption}.{defaults}\n"
    if block == "needle":
        plain = next((r for c, r in rows if c["drafter"] == PLAIN), None)
        answered = len(plain["answer_lengths"]) if plain else 0
        head += f"\nThe plain model answers {answered} of {cell['prompts']} questions.\n"
        return head + _NEEDLE_NOTE + _needle(drafts, labels) + _NEEDLE_END
    if block == "long":
        return head + _LONG_NOTE + _long(drafts, labels)
    return head + "\nAcceptance, and mean acceptance length.\n" + _by_task(drafts, labels)


def _settings(drafts: list[Row]) -> tuple[list[str], list[str]]:
    """The defaults that the rows follow, for the caption; and each row's label with what differs.

    `first_layers_factor` matters, and is in a cell, only where some layers are first ones.
    """
    chosen = [c.get("selection", {}) for c, _ in drafts]
    fields = dict.fromkeys(field for selection in chosen for field in selection)
    labels = []
    for cell, selection in zip((c for c, _ in drafts), chosen, strict=True):
        own = [f"{_words(f)} {v}" for f, v in selection.items() if v != _DEFAULTS[f]]
        if "draft_model" in cell:
            window = cell["window"]
            own.insert(0, cell["draft_model"])
            own.insert(1, "all of its KV" if window is None else f"window {window}")
        labels.append(f"`{cell['drafter']}`" + (f" ({', '.join(own)})" if own else ""))
    return [f"{_words(f)} {_DEFAULTS[f]}" for f in fields], labels


def _words(field: str) -> str:
    return field.removeprefix("num_").replace("_", " ")


def _order(cell: Cell) -> tuple[Any, ...]:
    window = cell.get("window") or 0
    return (
        DRAFTERS.index(cell["drafter"]),
        str(cell.get("draft_model")),
        window,
        *_difference(cell),
        cell.get("budget", 0),
        cell["draft_length"],
    )


def _difference(cell: Cell) -> tuple[bool, str]:
    """Rows of other settings come after those of the defaults."""
    own = {f: v for f, v in cell.get("selection", {}).items() if v != _DEFAULTS[f]}
    return bool(own), str(own)


def _by_task(drafts: list[Row], labels: list[str]) -> str:
    tasks = list(dict.fromkeys(c["task"] for c, _ in drafts))
    table: dict[tuple[str, str], dict[str, str]] = {}
    for (cell, result), label in zip(drafts, labels, strict=True):
        shown = f"{_share(result)} ({_mean_length(result):.2f})"
        table.setdefault((label, _budget(cell)), {})[cell["task"]] = shown
    rows = ([*key, *(row.get(task, "") for task in tasks)] for key, row in table.items())
    return _table(["drafter", "budget", *tasks], rows)


def _needle(drafts: list[Row], labels: list[str]) -> str:
    streaming = {c["budget"]: r for c, r in drafts if c["drafter"] == "streaming"}
    rows = []
    for (cell, result), label in zip(drafts, labels, strict=True):
        twice = streaming.get(2 * cell.get("budget", 0))
        counts = f"{result['accepted']} of {result['examined']}"
        other = _share(twice) if twice is not None else ""
        rows.append([label, _budget(cell), _share(result), counts, other])
    names = ["drafter", "budget", "acceptance", "tokens", "`streaming` at twice the budget"]
    return _table(names, rows)


def _long(drafts: list[Row], labels: list[str]) -> str:
    width = max((r["bucket"] for _, r in drafts), default=1)
    count = max((len(r["by_position"]) for _, r in drafts), default=0)
    buckets = [f"{i * width + 1}-{(i + 1) * width}" for i in range(count)]
    rows = []
    for (cell, result), label in zip(drafts, labels, strict=True):
        curve = [f"{a / n:.1%}" if n else "" for a, n in result["by_position"]]
        curve += [""] * (count - len(curve))
        rows.append([label, _budget(cell), *curve, f"{_share(result)}"])
    return _table(["drafter", "budget", *buckets, "all"], rows)


def _texts(cells: list[Row]) -> str:
    """The text that everything was judged on, and how often bf16 left it."""
    rows = [
        [
            *_place(cell),
            cell["dtype"],
            str(cell["prompts"]),
            f"{result['distinct_4grams']:.1%}",
        ]
        for cell, result in cells
        if cell["drafter"] == PLAIN
    ]
    dtypes = dict.fromkeys(cell["dtype"] for cell, _ in cells)
    ties = "\n".join(_divergences(cells, dtype) for dtype in dtypes)
    names = ["block", "task", "prompt tokens", "dtype", "streams", "distinct 4-grams"]
    title = "## The texts\n\nA model that repeats itself flatters acceptance.\n"
    return f"{title}{_table(names, rows)}\n{ties}"


def _divergences(cells: list[Row], dtype: str) -> str:
    drafted = [r for c, r in cells if c["drafter"] != PLAIN and c["dtype"] == dtype]
    diverged = sum(result["diverged"] for result in drafted)
    streams = sum(result["streams"] for result in drafted)
    compared = sum(result["compared"] for result in drafted)
    left = f"{dtype}: {diverged} of {streams} drafted streams left the plain one"
    if diverged == 0:
        return f"{left}, in {compared:,} compared positions.\n"
    return (
        f"{left}, in {compared:,} compared positions: rounding in the KV cache decides between "
        "near-equal scores. Such a stream counts up to there.\n"
    )


def _all_cells(cells: list[Row]) -> str:
    drafts = [(c, r) for c, r in cells if c["drafter"] != PLAIN]
    _, labels = _settings(drafts)
    rows = []
    for (cell, result), label in zip(drafts, labels, strict=True):
        drafted = result["drafted"] / max(result["rounds"], 1)
        numbers = [result["rounds"], f"{drafted:.2f}", result["accepted"], result["examined"]]
        ends = [f"{_mean_length(result):.2f}", f"{result['diverged']} of {result['streams']}"]
        rows.append([*_place(cell), cell["dtype"], label, _budget(cell), *map(str, numbers), *ends])
    names = ["block", "task", "prompt tokens", "dtype", "drafter", "budget", "rounds"]
    names += [
        "drafts a round",
        "accepted",
        "examined",
        "mean acceptance length",
        "diverged streams",
    ]
    return "## Every cell\n" + _table(names, rows)


def _place(cell: Cell) -> list[str]:
    return [cell["block"], cell["task"], f"{cell['context']:,}"]


def _budget(cell: Cell) -> str:
    return str(cell.get("budget", "-"))


def _share(result: dict[str, Any]) -> str:
    return f"{result['accepted'] / result['examined']:.1%}" if result["examined"] else "no draft"


def _mean_length(result: dict[str, Any]) -> float:
    mean: float = 1.0 + result["accepted"] / max(result["rounds"], 1)
    return mean


def _table(names: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["", "| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])
