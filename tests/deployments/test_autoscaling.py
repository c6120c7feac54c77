"""The number of replicas follows KV tokens: the arithmetic, and a local cluster up and down."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from magicdec.deployments.app import APP_NAME, REPLICA_DEPLOYMENT
from magicdec.deployments.autoscaling import (
    CAPACITY,
    IN_FLIGHT,
    QUEUED,
    replica_stats,
    replicas_wanted,
)
from magicdec.deployments.settings import SettingsError, parse_settings
from magicdec.stats import EngineLoad
from tests.deployments.conftest import MODEL, AppFactory, ServedApp

BUSY = 2  # streams
WAIT_S = 60


def metrics(in_flight: list[float], queued: float, capacity: float) -> dict[str, Any]:
    names = range(len(in_flight))
    return {
        IN_FLIGHT: dict(zip(names, in_flight, strict=True)),
        QUEUED: dict.fromkeys(names, queued),
        CAPACITY: dict.fromkeys(names, capacity),
    }


def test_one_long_prompt_counts_as_much_as_many_short_ones() -> None:
    assert replicas_wanted(metrics([128_000], 0, 100_000), 0.8, 1) == 2
    assert replicas_wanted(metrics([600 * 200], 8_000, 100_000), 0.8, 1) == 2
    assert replicas_wanted(metrics([10 * 200], 0, 100_000), 0.8, 1) == 1


def test_the_routers_queue_counts_once_however_many_report_it() -> None:
    assert replicas_wanted(metrics([50, 50, 50], 100, 100), 1.0, 3) == 3
    assert replicas_wanted(metrics([50, 50, 50], 151, 100), 1.0, 3) == 4


def test_before_anybody_has_reported_nothing_changes() -> None:
    assert replicas_wanted({}, 0.7, 5) == 5


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 1e7), st.floats(0.05, 1.0))
def test_the_pools_are_filled_to_the_target_and_no_further(
    in_flight: list[float], queued: float, target: float
) -> None:
    capacity = 1e6
    wanted = replicas_wanted(metrics(in_flight, queued, capacity), target, 1)
    tokens = sum(in_flight) + queued
    assert wanted >= 1
    assert tokens <= wanted * capacity * target * (1 + 1e-9)
    assert wanted == 1 or tokens > (wanted - 1) * capacity * target * (1 - 1e-9)


def test_what_waits_in_a_replica_is_in_flight() -> None:
    load = EngineLoad(1, 1, free_kv_tokens=600, total_kv_tokens=1000, num_waiting_tokens=50)
    assert replica_stats(load, 7) == {IN_FLIGHT: 450, QUEUED: 7, CAPACITY: 1000}


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"num_replicas": 2, "autoscaling": {"max_replicas": 3}}, "num_replicas"),
        ({"autoscaling": {"min_replicas": 4, "max_replicas": 3}}, "max_replicas"),
        ({"autoscaling": {"target_kv_usage": 1.5}}, "target_kv_usage"),
        ({"autoscaling": {"min_replicas": 0}}, "min_replicas"),
    ],
)
def test_settings_that_contradict_are_refused(server: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_settings({"server": server})


@pytest.fixture
def app(run_app: AppFactory) -> ServedApp:
    return run_app(
        autoscaling={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_kv_usage": 0.1,  # of 4,096 tokens a replica
            "look_back_s": 1,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 1,
        },
        drain_timeout_s=10,
    )


class Load:
    """Streams without an end, until it is told to stop."""

    def __init__(self, app: ServedApp) -> None:
        self._app = app
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(BUSY)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stopped.is_set():
            self._app.client().completions.create(
                model=MODEL,
                prompt=f"{number} " * 100,
                max_tokens=200,
                extra_body={"ignore_eos": True, "speculation": "off"},
            )


def wait_for_replicas(count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        deployment = serve.status().applications[APP_NAME].deployments[REPLICA_DEPLOYMENT]
        running = {str(state): n for state, n in deployment.replica_states.items()}
        if running.get("RUNNING", 0) == count and sum(running.values()) == count:
            return
        assert time.monotonic() < deadline, f"{running}, wanted {count} running"
        time.sleep(0.25)


@pytest.fixture
def at_rest(app: ServedApp) -> Iterator[ServedApp]:
    wait_for_replicas(1)
    yield app


@pytest.mark.slow  # two replicas start and one drains
def test_replicas_come_with_tokens_and_go_with_them(at_rest: ServedApp) -> None:
    with Load(at_rest):
        wait_for_replicas(2)
    wait_for_replicas(1)
    answer = at_rest.client().completions.create(model=MODEL, prompt="still there", max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens > 0
