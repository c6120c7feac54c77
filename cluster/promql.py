"""Queries over the metric table: what names no metric of it, or no label of that metric, cannot be
written."""

from magicdec.cluster.metrics import COMMON_LABELS, Kind, Metric

# Grafana's variables: what is chosen above the panels, and an interval that holds enough scrapes.
SELECTED = 'model_name=~"$model_name"'
INTERVAL = "$__rate_interval"


def _check(metric: Metric, kind: Kind, labels: tuple[str, ...]) -> None:
    if metric.kind is not kind:
        raise ValueError(f"{metric.name} is a {metric.kind.value}, not a {kind.value}")
    unknown = set(labels) - {*metric.labels, *COMMON_LABELS}
    if unknown:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")


def _sum(inner: str, by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(by)}) ({inner})" if by else f"sum({inner})"


class Selection:
    """Over which series and which interval. `matchers`, of label values, narrow one metric."""

    def __init__(self, selector: str = SELECTED, interval: str = INTERVAL) -> None:
        self._selector = selector
        self._interval = interval

    def _series(self, metric: Metric, suffix: str, matchers: dict[str, str] | None) -> str:
        narrowed = [f'{label}=~"{pattern}"' for label, pattern in (matchers or {}).items()]
        selectors = [part for part in (self._selector, *narrowed) if part]
        braces = "{" + ", ".join(selectors) + "}" if selectors else ""
        return f"{metric.exported}{suffix}{braces}"

    def rate(
        self, metric: Metric, *by: str, matchers: dict[str, str] | None = None, zero: bool = False
    ) -> str:
        """A counter's increase a second; `zero`: 0 where it was never counted. Raises ValueError
        for another kind of metric and for a label that it has not."""
        _check(metric, Kind.COUNTER, (*by, *(matchers or {})))
        found = _sum(f"rate({self._series(metric, '', matchers)}[{self._interval}])", by)
        return f"({found} or vector(0))" if zero else found

    def gauge(self, metric: Metric, *by: str, matchers: dict[str, str] | None = None) -> str:
        """The sum of a gauge now. Raises ValueError likewise."""
        _check(metric, Kind.GAUGE, (*by, *(matchers or {})))
        return _sum(self._series(metric, "", matchers), by)

    def mean(self, metric: Metric, *by: str) -> str:
        """The mean of a gauge over those that tell it. Raises ValueError likewise."""
        _check(metric, Kind.GAUGE, by)
        by_labels = f" by ({', '.join(by)}) " if by else ""
        return f"avg{by_labels}({self._series(metric, '', None)})"

    def quantile(self, metric: Metric, quantile: float, *by: str) -> str:
        """Of a histogram. Raises ValueError likewise."""
        _check(metric, Kind.HISTOGRAM, by)
        buckets = f"rate({self._series(metric, '_bucket', None)}[{self._interval}])"
        return f"histogram_quantile({quantile:g}, {_sum(buckets, ('le', *by))})"

    def share(self, part: Metric, whole: Metric, *by: str) -> str:
        """Of two counters, the quotient of their increases. Raises ValueError likewise."""
        return f"{self.rate(part, *by)} / {self.rate(whole, *by)}"
