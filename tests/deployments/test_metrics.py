"""The running application as Prometheus scrapes it, through Ray's exporter."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from magicdec.cluster import metric_table as m
from magicdec.cluster.metrics import COMMON_LABELS, Metric
from tests.deployments.conftest import MODEL, AppFactory, ServedApp

MOST_SHARE = 0.01  # of the rounds' time, that watching them may take


def scrape() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Sample name and labels -> value, of the node's exporter."""
    port = ray.nodes()[0]["MetricsExportPort"]  # type: ignore[no-untyped-call]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float], metric: Metric) -> float:
    return sum(value for (name, _), value in samples.items() if name == metric.exported)


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    return run_app()


def test_what_a_request_did_reaches_prometheus(app: ServedApp) -> None:
    before = scrape()
    answer = app.client().completions.create(
        model=MODEL, prompt="the quick brown fox", max_tokens=40, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 40
    deadline = time.monotonic() + 30
    samples = scrape()
    while total(samples, m.SUCCESSES) == total(before, m.SUCCESSES):
        assert time.monotonic() < deadline, "no answer is exported"
        time.sleep(0.2)
        samples = scrape()
    while total(samples, m.GENERATION_TOKENS) - total(before, m.GENERATION_TOKENS) < 40:
        assert time.monotonic() < deadline, "no tokens are exported"
        time.sleep(0.2)
        samples = scrape()
    assert total(samples, m.GENERATION_TOKENS) - total(before, m.GENERATION_TOKENS) == 40
    assert total(samples, m.ROUNDS) > total(before, m.ROUNDS)
    assert total(samples, m.DECISIONS) > total(before, m.DECISIONS)
    labels = [dict(labels) for (name, labels) in samples if name == m.SUCCESSES.exported]
    assert labels and all(found["model_name"] == MODEL for found in labels)
    assert all(found[label] for found in labels for label in COMMON_LABELS)


def test_gauges_of_an_idle_engine_stay(app: ServedApp) -> None:
    """Ray forgets a gauge once it has exported it: they are set anew while nothing happens."""
    for _ in range(4):
        samples = scrape()
        for gauge in (m.KV_CAPACITY, m.KV_BLOCKS, m.LIVE_REPLICAS):
            assert total(samples, gauge) > 0, gauge.name
        time.sleep(0.7)


def test_watching_takes_less_than_a_hundredth_of_the_rounds(app: ServedApp) -> None:
    """Self-timed, under load, of a model whose rounds take a few milliseconds."""

    def answer(prompt: str) -> None:
        app.client().completions.create(
            model=MODEL, prompt=prompt, max_tokens=400, extra_body={"ignore_eos": True}
        )

    before = scrape()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer, [f"{number} upon a time" for number in range(8)]))
    time.sleep(2.5)  # published and exported
    samples = scrape()
    steps = total(samples, m.STEP_SECONDS) - total(before, m.STEP_SECONDS)
    watching = total(samples, m.TELEMETRY_SECONDS) - total(before, m.TELEMETRY_SECONDS)
    assert steps > 1.0
    print(f"watching took {watching:.4f} s of {steps:.2f} s")
    assert watching < MOST_SHARE * steps
