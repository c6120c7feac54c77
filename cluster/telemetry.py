"""Counts of engines, of the router and of requests, to Prometheus through Ray's exporter.

Ray's recording takes microseconds a value, so engines count for themselves (round_tally.py) and
once a second the whole is recorded. Gauges are recorded anew each time: Ray forgets what it has
exported.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ray.util.metrics import Counter, Gauge, Histogram

from magicdec.cluster import metric_table as m
from magicdec.cluster.metrics import COMMON_LABELS, Kind, Metric
from magicdec.round_tally import EngineCounts, RoundTally, RowKind
from magicdec.routing.settings import AdmissionStats
from magicdec.routing.waiting import SHORTEST_CLASS
from magicdec.stats import EngineStats

PUBLISH_PERIOD_S = 1.0


class Recorder:
    """Ray's metrics of one process; `common` are the values of COMMON_LABELS."""

    def __init__(self, metrics: Iterable[Metric], common: Mapping[str, str]) -> None:
        """Raises ValueError unless every common label has a value."""
        if set(common) != set(COMMON_LABELS):
            raise ValueError(f"common must be of {COMMON_LABELS}, got {tuple(common)}")
        self._common = dict(common)
        self._metrics = {metric.name: _create(metric) for metric in metrics}
        self._set: dict[str, set[tuple[str, ...]]] = {}  # label values of gauges that were not 0

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        """Nothing is recorded for nothing: series begin when there is something in them."""
        counter = self._metrics[metric.name]
        assert isinstance(counter, Counter)
        if amount > 0:
            counter.inc(amount, self._tags(metric, labels))

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        gauge = self._metrics[metric.name]
        assert isinstance(gauge, Gauge)
        gauge.set(value, self._tags(metric, labels))

    def set_all(self, metric: Metric, values: Mapping[str, float]) -> None:
        """By the value of its only label; one that was set before and is not now is 0."""
        known = self._set.setdefault(metric.name, set())
        for (label,) in known - {(label,) for label in values}:
            self.set(metric, 0.0, label)
        for label, value in values.items():
            known.add((label,))
            self.set(metric, value, label)

    def observe(self, metric: Metric, value: float) -> None:
        histogram = self._metrics[metric.name]
        assert isinstance(histogram, Histogram)
        histogram.observe(value, self._common)

    def _tags(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return self._common | dict(zip(metric.labels, labels, strict=True))


def _create(metric: Metric) -> Counter | Gauge | Histogram:
    name, text, tags = metric.name, metric.help, metric.all_labels
    match metric.kind:
        case Kind.COUNTER:
            return Counter(name, text, tags)
        case Kind.GAUGE:
            return Gauge(name, text, tags)
        case Kind.HISTOGRAM:
            return Histogram(name, text, list(metric.boundaries), tags)


def common_labels(model_name: str, replica_id: str) -> dict[str, str]:
    return dict(zip(COMMON_LABELS, (model_name, replica_id), strict=True))


def context_label(bucket: int) -> str:
    """The least context of a bucket of acceptance/prior.py, in tokens."""
    return str(64 << bucket) if bucket > 0 else "0"


class EngineTelemetry:
    """What one engine counted, recorded. One thread calls it."""

    def __init__(self, recorder: Recorder, attention_backend: str, num_ranks: int) -> None:
        self._recorder = recorder
        self._info = (attention_backend, str(num_ranks))
        self._last = EngineStats()

    def publish(self, counts: EngineCounts) -> None:
        started = time.perf_counter()
        self._publish_state(counts)
        self._publish_tokens(counts.stats, counts.tally)
        self._publish_drafts(counts.tally)
        self._publish_times(counts.tally)
        self._last = replace(counts.stats)
        seconds = time.perf_counter() - started + counts.tally.tally_seconds
        self._recorder.count(m.TELEMETRY_SECONDS, seconds)

    def _publish_state(self, counts: EngineCounts) -> None:
        put, load, blocks = self._recorder.set, counts.load, counts.blocks
        held = load.total_kv_tokens - load.free_kv_tokens
        put(m.REQUESTS_RUNNING, load.num_running)
        put(m.REQUESTS_WAITING, load.num_waiting)
        put(m.KV_USAGE, held / load.total_kv_tokens)
        put(m.KV_CAPACITY, load.total_kv_tokens)
        put(m.PREFILL_BACKLOG, load.num_prefill_tokens)
        put(m.KV_BLOCKS, blocks.num_held, "held")
        put(m.KV_BLOCKS, blocks.num_cached, "cached")
        put(m.KV_BLOCKS, blocks.num_empty, "empty")
        put(m.TOKENS_IN_FLIGHT, held, "held")
        put(m.TOKENS_IN_FLIGHT, load.num_waiting_tokens, "waiting")
        put(m.ENGINE_INFO, 1, *self._info)

    def _publish_tokens(self, stats: EngineStats, tally: RoundTally) -> None:
        add, last = self._recorder.count, self._last
        num_prompt = stats.num_prompt_tokens - last.num_prompt_tokens
        add(m.PROMPT_TOKENS, num_prompt)
        add(m.PREFIX_QUERIES, num_prompt)
        add(m.PREFIX_HITS, stats.num_cached_tokens - last.num_cached_tokens)
        add(m.PREEMPTIONS, stats.num_preemptions - last.num_preemptions)
        add(m.GENERATION_TOKENS, tally.num_emitted_tokens)

    def _publish_drafts(self, tally: RoundTally) -> None:
        for plan, rounds in tally.rounds.items():
            decision = "trial" if plan.explores else "best"
            length, budget = str(plan.draft_length), f"{plan.draft_budget:g}"
            self._recorder.count(m.ROUNDS, rounds, plan.drafter, length, budget, decision)
        for (metric, *labels), amount in _draft_sums(tally.rows).items():
            self._recorder.count(metric, amount, *labels)

    def _publish_times(self, tally: RoundTally) -> None:
        add = self._recorder.count
        add(m.STEP_SECONDS, tally.step_seconds)
        add(m.PASS_SECONDS, tally.draft_seconds, "draft")
        add(m.PASS_SECONDS, tally.verify_seconds, "verify")
        add(m.KV_READ, tally.num_draft_positions, "draft")
        add(m.KV_READ, tally.num_verify_positions, "verify")
        add(m.STALL_SECONDS, tally.stall_seconds)
        add(m.FORESEEN_SECONDS, tally.foreseen_step_seconds)
        add(m.PREDICTED_SECONDS, tally.predicted_step_seconds)
        add(m.FORECAST_ERROR, tally.forecast_error_seconds)
        add(m.PLAIN_SECONDS, tally.plain_seconds)
        for bound, seconds in tally.bounds.items():
            add(m.BOUND_SECONDS, seconds, bound)


def _draft_sums(rows_of: Mapping[RowKind, int]) -> dict[tuple[Metric, *tuple[str, ...]], int]:
    """By metric and labels. Kinds of rows are many and series few, and recording takes Ray longer
    than adding up does."""
    sums: defaultdict[tuple[Metric, *tuple[str, ...]], int] = defaultdict(int)
    for row, rows in rows_of.items():
        context, drafted, accepted = context_label(row.context), row.num_drafted, row.num_accepted
        sums[m.ROWS, context, str(drafted)] += rows
        if drafted == 0:
            continue
        sums[(m.DRAFTS,)] += rows
        sums[(m.DRAFT_TOKENS,)] += rows * drafted
        sums[(m.ACCEPTED_TOKENS,)] += rows * accepted
        sums[m.DRAFTER_TOKENS, row.drafter] += rows * drafted
        sums[m.DRAFTER_ACCEPTED, row.drafter] += rows * accepted
        for position in range(min(accepted + 1, drafted)):
            sums[m.EXAMINED, context, str(position)] += rows
        for position in range(accepted):
            sums[m.ACCEPTED, context, str(position)] += rows
            sums[m.ACCEPTED_PER_POS, str(position)] += rows
    return sums


class RouterTelemetry:
    """What the router decided and who waits, recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._last: dict[str, int] = {}

    def publish(self, stats: AdmissionStats) -> None:
        recorder = self._recorder
        recorder.set(m.QUEUED_TOKENS, stats.num_queued_tokens)
        recorder.set(m.LIVE_REPLICAS, stats.num_live_replicas)
        recorder.set(m.RESERVED_REPLICAS, stats.num_reserved_replicas)
        if stats.drain_tokens_per_s is not None:
            recorder.set(m.DRAIN_RATE, stats.drain_tokens_per_s)
        queued = {str(SHORTEST_CLASS): 0.0}
        queued |= {str(1 << length): float(n) for length, n in stats.num_queued_by_class.items()}
        recorder.set_all(m.QUEUED_REQUESTS, queued)
        totals = {
            "released": stats.num_released,
            "refused": stats.num_refused,
            "abandoned": stats.num_abandoned,
            "dropped_report": stats.num_dropped_reports,
            "dropped_policy": stats.num_dropped_policies,
        }
        for decision, total in totals.items():
            recorder.count(m.DECISIONS, total - self._last.get(decision, 0), decision)
        self._last = totals
