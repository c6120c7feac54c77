"""Contenders side by side: a Markdown table and a picture, from the records of a run."""

import platform
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from magicdec.profiling.device_rates import device_name
from tests.benchmarks.acceptance_rounds import distinct_4grams
from tests.benchmarks.peers.specs import BASELINE

PREFILL = -1  # the number of the round in which prompts are computed
# Colours that people who tell few apart can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#56B4E9", "#999999", "#E69F00", "#D55E00", "#009E73")
_HEAD = (
    "workload",
    "contender",
    "tokens/s",
    "beside vLLM",
    "distinct 4-grams",
    "prefill, tokens/s",
)

Record = dict[str, Any]


def describe_machine(threads: int, arguments: Sequence[str]) -> dict[str, str | int]:
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": psutil.cpu_count() or 0,
        "threads": threads,
        "memory, GiB": round(psutil.virtual_memory().total / (1 << 30)),
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "arguments": shlex.join(arguments),
    }


def render(records: Sequence[Record]) -> str:
    """Medians over the rounds, [lowest .. highest]; ratios are taken round by round.

    A prefill rate is that of the first prompts which a process gets: it keeps them.
    """
    lines = [f"{name}: {value}" for r in records if "run" in r for name, value in r["run"].items()]
    lines += ["", f"| {' | '.join(_HEAD)} |", "| --- " * len(_HEAD) + "|"]
    for workload, contenders in grouped(records).items():
        base = _rates(contenders.get(BASELINE, []))
        for name, rounds in contenders.items():
            cells = _cells(rounds, base)
            lines.append(f"| {workload} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grouped(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Records by workload and contender, as they came."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if "contender" in record:
            contenders = found.setdefault(record["workload"]["name"], {})
            contenders.setdefault(record["contender"], []).append(record)
    return found


def draw(records: Sequence[Record], path: Path) -> None:
    """A group of bars a workload: median tokens/s, whiskers from lowest to highest."""
    found = grouped(records)
    names = list(dict.fromkeys(name for contenders in found.values() for name in contenders))
    figure = Figure(figsize=(11.0, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for place, contenders in enumerate(found.values()):
            rates = list(_rates(contenders.get(name, [])).values())
            if rates:
                middle = statistics.median(rates)
                axes.bar(
                    place + (i - (len(names) - 1) / 2) * width,
                    middle,
                    width,
                    yerr=[[middle - min(rates)], [max(rates) - middle]],
                    color=_COLOURS[i % len(_COLOURS)],
                    capsize=2,
                    label=name,
                )
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes.legend(shown.values(), shown.keys(), frameon=False)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("decoded tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _cells(rounds: Sequence[Record], base: dict[int, float]) -> list[str]:
    rates = _rates(rounds)
    failed = [r["error"] for r in rounds if "error" in r]
    if not rates:
        return [f"failed: {failed[0] if failed else 'no answer'}", "", "", ""]
    ratios = [rate / base[number] for number, rate in rates.items() if number in base]
    decoded = [r for r in rounds if r["round"] != PREFILL and "error" not in r]
    grams = statistics.mean(distinct_4grams(r["token_ids"]) for r in decoded)
    begun = [r for r in rounds if r["round"] == PREFILL and r.get("is_first")]
    prefill = [_num_prompt_tokens(r) / r["begin_seconds"] for r in begun]
    return [
        _spread(list(rates.values()), ".1f") + (f", {len(failed)} failed" if failed else ""),
        _spread(ratios, ".2f") if ratios else "",
        f"{grams:.0%}",
        f"{prefill[0]:.0f}" if prefill else "",
    ]


def _rates(rounds: Sequence[Record]) -> dict[int, float]:
    """Tokens a second by round."""
    return {
        r["round"]: r["num_tokens"] / r["seconds"]
        for r in rounds
        if r["round"] != PREFILL and "error" not in r
    }


def _num_prompt_tokens(record: Record) -> int:
    workload = record["workload"]
    return int(workload["batch_size"] * workload["context_len"])


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} [{low:{form}} .. {high:{form}}]"
