"""The CPU example of the chart: its rendered Serve config on a local Ray, and Prometheus beside it.

It brings a Ray of its own, so other tests of a process would lose theirs: the whole file is slow,
and tests/helm/test_chart.py runs its first test in a process by itself.
Every query of the dashboard must find something while requests come: Prometheus itself scrapes
Ray's exporter and evaluates them.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from openai import OpenAI
from ray import serve
from ray.serve.schema import ServeDeploySchema

from magicdec.cluster import metric_table as m
from magicdec.cluster.dashboard import ROWS
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from tests.helm.chart import CHART, example, render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not on PATH"
)

WORDS = "the quick brown fox jumps over the lazy dog while the river runs to the sea "
START_LIMIT_S = 240
LOAD_S = 60
PROMETHEUS_LIMIT_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The application as KubeRay deploys it: the config through Serve's own schema and client."""
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112
    if ray.is_initialized():
        ray.shutdown()
    config = render(example(CHART / "examples" / "cpu-demo.yaml")).serve_config
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    ray.init(address="local", include_dashboard=False, num_cpus=16, log_to_driver=False)
    serve.start(http_options=config["http_options"])
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
    address = f"http://127.0.0.1:{config['http_options']['port']}"
    deadline = time.monotonic() + START_LIMIT_S
    while httpx.get(f"{address}/health", timeout=10).status_code != 200:
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.5)
    yield address
    ray.shutdown()


def ask(url: str, number: int, num_words: int, **fields: object) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    answer = client.completions.create(
        model=EMBEDDED_MODEL_NAME,
        prompt=f"{number}. " + WORDS * (num_words // 16),
        max_tokens=60,
        temperature=0,
        extra_body={"ignore_eos": True, **fields},
    )
    return answer.choices[0].text


def test_the_example_answers(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    answer = client.chat.completions.create(
        model=EMBEDDED_MODEL_NAME,
        messages=[{"role": "user", "content": "Name the capital of Italy."}],
        max_tokens=24,
        temperature=0,
    )
    assert "Rome" in (answer.choices[0].message.content or "")


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    exporter = ray.nodes()[0]["MetricsExportPort"]  # type: ignore[no-untyped-call]
    scrape = {
        "job_name": "ray",
        "scrape_interval": "2s",
        "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}],
    }
    config = Path(folder / "prometheus.yaml")
    config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PROMETHEUS_LIMIT_S
        while not is_ready(address):
            said = (folder / "log.txt").read_text()
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def is_ready(prometheus: str) -> bool:
    try:
        return httpx.get(f"{prometheus}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def values_of(prometheus: str, expr: str) -> list[float]:
    query = expr.replace("$__rate_interval", "30s").replace("$model_name", ".*")
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=20).json()
    assert answer["status"] == "success", json.dumps(answer)
    values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    return [value for value in values if not math.isnan(value)]


@needs_prometheus
def test_every_panel_has_data_under_load(url: str, prometheus: str) -> None:
    wish = {"speculation": {"drafter": "recycled", "draft_length": 4, "draft_budget": 256}}
    missing = {(panel.title, q.expr) for row in ROWS for panel in row.panels for q in panel.queries}
    deadline = time.monotonic() + LOAD_S + START_LIMIT_S
    number = 0
    with ThreadPoolExecutor(4) as pool:
        while missing:
            assert time.monotonic() < deadline, sorted(missing)
            asked = [
                pool.submit(ask, url, number, 100, **wish),
                pool.submit(ask, url, number + 1, 900, **wish),
                pool.submit(ask, url, number + 1, 900),
                pool.submit(ask, url, number + 2, 40),
            ]
            number += 3
            while not all(one.done() for one in asked):
                missing = {panel for panel in missing if not values_of(prometheus, panel[1])}
                time.sleep(1)
            assert all(one.result() for one in asked)


@needs_prometheus
def test_watching_takes_less_than_a_hundredth_of_the_rounds(prometheus: str) -> None:
    """Of the embedded model with rounds that choose, forecasts included."""
    expr = f"sum({m.TELEMETRY_SECONDS.exported}) / sum({m.STEP_SECONDS.exported})"
    (share,) = values_of(prometheus, expr)
    print(f"watching takes {share:.2%} of the steps' time")
    assert 0.0 < share < 0.01
