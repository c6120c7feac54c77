"""What a metric is, and how Prometheus comes to see it through Ray's exporter."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

EXPORT_PREFIX = "ray_"  # Ray puts it before every name
COMMON_LABELS = ("model_name", "ReplicaId")  # of all, as vLLM has them under Ray
VLLM_PREFIX = "vllm_"


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(Enum):
    """The process that counts it."""

    ENGINE = "engine"
    ROUTER = "router"
    INGRESS = "ingress"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A name that begins with `vllm_` means what vLLM's means, so that dashboards made
    for vLLM under Ray show this server, too.

    Raises ValueError for a histogram without `boundaries`, and for boundaries of anything else.
    """

    name: str
    kind: Kind
    source: Source
    help: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()  # upper ones; Prometheus adds +Inf

    def __post_init__(self) -> None:
        if bool(self.boundaries) != (self.kind is Kind.HISTOGRAM):
            raise ValueError(f"{self.name}: boundaries are a histogram's, got {self.boundaries}")

    @property
    def exported(self) -> str:
        """The name in Prometheus; of a histogram without `_bucket`, `_sum` or `_count`."""
        suffix = "_total" if self.kind is Kind.COUNTER else ""
        return f"{EXPORT_PREFIX}{self.name}{suffix}"

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*COMMON_LABELS, *self.labels)


def table_of(metrics: Iterable[Metric]) -> str:
    """Markdown, as docs/metrics.md has it."""
    lines = ["| Metric | Kind | From | Labels | What it is |", "| --- | --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind, source = metric.kind.value, metric.source.value
        lines.append(f"| `{metric.exported}` | {kind} | {source} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
