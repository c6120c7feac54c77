"""What counts become as metrics; that Prometheus sees them is held by tests/deployments."""

import re
from collections import defaultdict
from typing import Any, cast

import pytest

from magicdec.cluster import metric_table as m
from magicdec.cluster.metrics import Kind, Metric, Source
from magicdec.cluster.telemetry import EngineTelemetry, Recorder, RouterTelemetry, context_label
from magicdec.round_tally import EngineCounts, RoundKind, RoundTally, RowKind
from magicdec.routing.settings import AdmissionStats
from magicdec.stats import EngineLoad, EngineStats, KvBlocks

Series = tuple[str, ...]


class Recorded:
    """Implements Recorder, and keeps what it was told."""

    def __init__(self) -> None:
        self.totals: defaultdict[Series, float] = defaultdict(float)
        self.values: dict[Series, float] = {}

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        assert metric.kind is Kind.COUNTER and len(labels) == len(metric.labels)
        assert amount >= 0
        self.totals[metric.name, *labels] += amount

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.kind is Kind.GAUGE and len(labels) == len(metric.labels)
        self.values[metric.name, *labels] = value

    def set_all(self, metric: Metric, values: dict[str, float]) -> None:
        for label, value in values.items():
            self.set(metric, value, label)

    def of(self, metric: Metric, *labels: str) -> float:
        return (self.totals | self.values)[metric.name, *labels]


def counts(tally: RoundTally, stats: EngineStats | None = None) -> EngineCounts:
    load = EngineLoad(3, 1, free_kv_tokens=700, total_kv_tokens=1000, num_waiting_tokens=90)
    return EngineCounts(load, KvBlocks(3, 2, 5), stats or EngineStats(), tally)


def engine(recorded: Recorded) -> EngineTelemetry:
    return EngineTelemetry(cast(Recorder, recorded), "torch", 1)


def test_drafts_are_examined_up_to_the_first_that_fails() -> None:
    recorded, tally = Recorded(), RoundTally()
    tally.rows[RowKind("recycled", 5, 4, 2)] = 10  # two accepted, the third examined, not the last
    tally.rows[RowKind("recycled", 5, 4, 4)] = 5
    tally.rows[RowKind("none", 5, 0, 0)] = 7
    engine(recorded).publish(counts(tally))
    examined = [recorded.of(m.EXAMINED, "2048", str(position)) for position in range(4)]
    accepted = [recorded.of(m.ACCEPTED, "2048", str(position)) for position in range(4)]
    assert examined == [15, 15, 15, 5] and accepted == [15, 15, 5, 5]
    assert recorded.of(m.DRAFTS) == 15
    assert recorded.of(m.DRAFT_TOKENS) == recorded.of(m.DRAFTER_TOKENS, "recycled") == 60
    assert recorded.of(m.ACCEPTED_TOKENS) == sum(accepted) == 40
    assert recorded.of(m.ROWS, "2048", "0") == 7


def test_choices_are_counted_with_their_reason() -> None:
    recorded, tally = Recorded(), RoundTally()
    tally.rounds[RoundKind("recycled", 4, 512, False)] = 9
    tally.rounds[RoundKind("ngram", 2, 256, True)] = 1
    engine(recorded).publish(counts(tally))
    assert recorded.of(m.ROUNDS, "recycled", "4", "512", "best") == 9
    assert recorded.of(m.ROUNDS, "ngram", "2", "256", "trial") == 1


def test_totals_of_an_engine_are_recorded_once() -> None:
    recorded = Recorded()
    telemetry, stats = engine(recorded), EngineStats(num_prompt_tokens=100, num_cached_tokens=40)
    telemetry.publish(counts(RoundTally(), stats))
    stats.num_prompt_tokens = 130
    telemetry.publish(counts(RoundTally(), stats))
    telemetry.publish(counts(RoundTally(), stats))
    assert recorded.of(m.PROMPT_TOKENS) == recorded.of(m.PREFIX_QUERIES) == 130
    assert recorded.of(m.PREFIX_HITS) == 40


def test_memory_is_told_by_state() -> None:
    recorded = Recorded()
    engine(recorded).publish(counts(RoundTally()))
    assert recorded.of(m.KV_USAGE) == pytest.approx(0.3)
    states = {state: recorded.of(m.KV_BLOCKS, state) for state in ("held", "cached", "empty")}
    assert states == {"held": 3, "cached": 2, "empty": 5}
    assert recorded.of(m.TOKENS_IN_FLIGHT, "held") == 300
    assert recorded.of(m.TOKENS_IN_FLIGHT, "waiting") == 90


def test_publishing_counts_its_own_time() -> None:
    recorded, tally = Recorded(), RoundTally(tally_seconds=2.0)
    engine(recorded).publish(counts(tally))
    assert 2.0 < recorded.of(m.TELEMETRY_SECONDS) < 2.5


def test_the_router_tells_decisions_once_and_who_waits() -> None:
    recorded = Recorded()
    telemetry = RouterTelemetry(cast(Recorder, recorded))
    stats = AdmissionStats(3, 5000, 2, 0, 7, 1, 0, 0, 12.5, {8: 2, 12: 1})
    telemetry.publish(stats)
    telemetry.publish(stats)
    assert recorded.of(m.DECISIONS, "released") == 7
    assert recorded.of(m.QUEUED_REQUESTS, "256") == 2
    assert recorded.of(m.QUEUED_REQUESTS, "4096") == 1
    assert recorded.of(m.DRAIN_RATE) == 12.5


@pytest.mark.parametrize(("bucket", "least"), [(0, "0"), (1, "128"), (5, "2048"), (14, "1048576")])
def test_a_context_bucket_is_named_by_its_least_context(bucket: int, least: str) -> None:
    assert context_label(bucket) == least


def test_names_are_prometheus_names_and_used_once() -> None:
    names = [metric.name for metric in m.METRICS]
    assert len(set(names)) == len(names)
    for metric in m.METRICS:
        assert re.fullmatch(r"(vllm|magicdec)_[a-z0-9_]+", metric.name)
        assert all(re.fullmatch(r"[a-z_]+", label) for label in metric.labels)
        assert not metric.name.endswith("_total")  # Ray adds it


def test_every_metric_of_the_table_is_among_those_recorded() -> None:
    defined = {value.name for value in vars(m).values() if isinstance(value, Metric)}
    assert defined == {metric.name for metric in m.METRICS}
    for source, group in (
        (Source.ENGINE, m.ENGINE_METRICS),
        (Source.ROUTER, m.ROUTER_METRICS),
        (Source.INGRESS, m.INGRESS_METRICS),
    ):
        assert {metric.source for metric in group} == {source}


def test_boundaries_are_a_histograms() -> None:
    with pytest.raises(ValueError, match="boundaries"):
        Metric("magicdec_x", Kind.HISTOGRAM, Source.ENGINE, "")
    with pytest.raises(ValueError, match="boundaries"):
        Metric("magicdec_x", Kind.GAUGE, Source.ENGINE, "", boundaries=(1.0,))


def test_a_recorder_knows_whose_metrics_they_are() -> None:
    with pytest.raises(ValueError, match="model_name"):
        Recorder((), cast(Any, {"model_name": "m"}))
