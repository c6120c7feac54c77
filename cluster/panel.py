"""What a panel is, and a row of them."""

from dataclasses import dataclass

from magicdec.cluster.metrics import Metric
from magicdec.cluster.promql import Selection

_P50, _P95 = 0.5, 0.95


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str  # with Grafana's {{label}}


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's: percentunit is a share, s seconds."""

    title: str
    help: str
    unit: str
    queries: tuple[Query, ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    question: str
    panels: tuple[Panel, ...]


def line_panel(
    title: str, text: str, unit: str, expr: str, legend: str, stacked: bool = False
) -> Panel:
    return Panel(title, text, unit, (Query(expr, legend),), stacked)


def latency_panel(selection: Selection, title: str, text: str, metric: Metric) -> Panel:
    queries = (
        Query(selection.quantile(metric, _P50), "half of them"),
        Query(selection.quantile(metric, _P95), "95 % of them"),
    )
    return Panel(title, text, "s", queries)
