"""Ratios of a grid's arms, taken pair by pair, with their confidence."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from magicdec.deployments.live_bench import PLAIN
from tests.benchmarks.policy_arms import ADAPTIVE, FIXED

# Student's t, two-sided 95 %, by degrees of freedom; beyond, the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean of paired ratios, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Raises ValueError for fewer than two pairs: they have no spread."""
    logs = [math.log(a / b) for a, b in zip(over, under, strict=True)]
    if len(logs) < 2:
        raise ValueError(f"a ratio needs two pairs at least, got {len(logs)}")
    t = _T95[len(logs) - 2] if len(logs) - 2 < len(_T95) else 1.96
    middle, half = statistics.mean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def render(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a row a point, and what it comes to."""
    points: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if "arm" in record:
            points[record["batch"], record["context"]][record["arm"]].append(record)
    lines = [f"{name}: {value}" for name, value in _facts(records).items()]
    lines += [
        "",
        "| batch x context | plain tokens/s | adaptive / plain | best fixed | its ratio |",
    ]
    lines[-1] += " adaptive / best fixed | chosen most | accepted |"
    lines.append("| --- " * 8 + "|")
    against_plain, against_fixed = [], []
    for (batch, context), arms in sorted(points.items()):
        num_pairs = min(len(found) for found in arms.values())
        if len(arms) < 2 + len(FIXED) or num_pairs < 2:
            continue
        rates = {arm: _rates(found, num_pairs) for arm, found in arms.items()}
        plain, adaptive = rates[PLAIN], rates[ADAPTIVE]
        best = max(FIXED, key=lambda arm: statistics.fmean(map(math.log, rates[arm])))
        to_plain, to_fixed = ratio(adaptive, plain), ratio(adaptive, rates[best])
        against_plain.append(to_plain)
        against_fixed.append(to_fixed)
        lines.append(
            f"| {batch} x {context:,} | {statistics.median(plain):.1f} | {to_plain} | {best} "
            f"| {ratio(rates[best], plain).mean:.2f} | {to_fixed} "
            f"| {_chosen(arms[ADAPTIVE])} | {_accepted(arms[ADAPTIVE])} |"
        )
    return "\n".join([*lines, "", *_summary(against_plain, against_fixed)])


def _summary(against_plain: list[Ratio], against_fixed: list[Ratio]) -> list[str]:
    if not against_plain:
        return ["no point has two pairs of all arms"]
    means = [math.log(r.mean) for r in against_plain]
    return [
        f"{len(means)} points. Adaptive / plain: geometric mean "
        f"{math.exp(statistics.fmean(means)):.3f}, least {min(r.mean for r in against_plain):.3f}, "
        f"{sum(r.high < 0.97 for r in against_plain)} with an upper bound under 0.97.",
        f"Adaptive / best fixed: geometric mean "
        f"{math.exp(statistics.fmean(math.log(r.mean) for r in against_fixed)):.3f}, "
        f"least {min(r.mean for r in against_fixed):.3f}, "
        f"{sum(r.mean < 0.95 for r in against_fixed)} points under 0.95.",
    ]


def _facts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next((r["run"] for r in records if "run" in r), {})


def _rates(found: list[dict[str, Any]], num_pairs: int) -> list[float]:
    """By pair."""
    ordered = sorted(found, key=lambda r: int(r["pair"]))[:num_pairs]
    return [r["num_tokens"] / r["seconds"] for r in ordered]


def _chosen(found: list[dict[str, Any]]) -> str:
    plans: Counter[str] = Counter()
    for record in found:
        plans.update(played["plan"] for played in record["rounds"])
    (name, count), total = plans.most_common(1)[0], sum(plans.values())
    return f"{name} ({count / total:.0%})"


def _accepted(found: list[dict[str, Any]]) -> str:
    drafted = sum(r["num_draft_tokens"] for r in found)
    return f"{sum(r['num_accepted_tokens'] for r in found) / drafted:.0%}" if drafted else "-"
