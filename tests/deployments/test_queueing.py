"""One replica with two places: who waits in the router, and what becomes of them when it dies."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from magicdec.deployments.app import APP_NAME
from magicdec.deployments.dispatch import FIRST_WAIT_S
from magicdec.deployments.replica_report import ReportAnswer
from magicdec.routing.settings import AdmissionStats
from tests.deployments.conftest import MODEL, AppFactory, ServedApp
from tests.magicdec.control.policies import counts, packed
from tests.magicdec.routing.replicas import report

NUM_CLIENTS = 8
MAX_QUEUED = 6


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    return run_app(max_num_seqs=2, max_queued_requests=MAX_QUEUED)


def ask(app: ServedApp, number: int, max_tokens: int = 150) -> httpx.Response:
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": f"client {number} asks",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": number,
        "return_token_ids": True,
    }
    return httpx.post(f"{app.url}/v1/completions", json=body, timeout=120)


def token_ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


def stats() -> AdmissionStats:
    router = serve.get_deployment_handle("Router", APP_NAME)
    found: AdmissionStats = router.stats.remote().result(timeout_s=20)
    return found


def wait_for_queue(num_queued: int) -> None:
    deadline = time.monotonic() + 20
    while stats().num_queued < num_queued:
        assert time.monotonic() < deadline, f"the queue holds {stats().num_queued}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(app: ServedApp) -> list[list[int]]:
    return [token_ids(ask(app, number)) for number in range(NUM_CLIENTS)]


def test_requests_wait_in_the_router_and_all_are_served(
    app: ServedApp, alone: list[list[int]]
) -> None:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [pool.submit(ask, app, number) for number in range(NUM_CLIENTS)]
        wait_for_queue(3)
        (replica,) = app.replicas()
        assert replica.load.num_running + replica.load.num_waiting <= 2
        assert [token_ids(answer.result()) for answer in answers] == alone
    assert stats().num_queued == 0


def test_no_waiting_request_is_lost_or_run_twice_when_the_router_dies(
    app: ServedApp, alone: list[list[int]]
) -> None:
    released_before = stats().num_released
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [pool.submit(ask, app, number) for number in range(NUM_CLIENTS)]
        wait_for_queue(3)
        time.sleep(1.5 * FIRST_WAIT_S)  # then those that wait know that they do
        before = stats()
        router = next(
            a for a in ray.util.list_named_actors(all_namespaces=True) if "Router" in a["name"]
        )
        ray.kill(ray.get_actor(router["name"], namespace=router["namespace"]))
        assert [token_ids(answer.result()) for answer in answers] == alone
    (replica,) = app.replicas()
    assert replica.load.num_running + replica.load.num_waiting == 0
    after = stats()  # the next router's, which counts from 0
    assert after.num_queued == 0
    num_released = before.num_released - released_before
    assert before.num_queued > 0 and after.num_released <= NUM_CLIENTS - num_released


def test_more_than_the_queue_holds_are_told_when_to_come_back(app: ServedApp) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(app, number, 300), range(16)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60


def test_a_client_that_leaves_the_queue_leaves_it(app: ServedApp) -> None:
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(ask, app, number, 400) for number in range(4)]
        wait_for_queue(1)
        before = stats().num_queued
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 400, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{app.url}/v1/completions", json=body, timeout=0.5)
        deadline = time.monotonic() + 3
        while stats().num_queued > before:
            assert time.monotonic() < deadline, "a client that has left is waited for"
            time.sleep(0.05)
        for answer in busy:
            token_ids(answer.result())


def test_what_replicas_have_learnt_passes_through_the_served_router(app: ServedApp) -> None:
    router = serve.get_deployment_handle("Router", APP_NAME)
    leaving = report(draining=True)  # so nothing is sent to replicas that are none
    deadline = time.monotonic() + 20
    told: ReportAnswer = router.report.remote("one", leaving, packed()).result(timeout_s=20)
    while told.policy is None:  # a router that is new tells nothing yet
        assert time.monotonic() < deadline, "nothing is told"
        time.sleep(0.2)
        router.report.remote("one", leaving, packed()).result(timeout_s=20)
        told = router.report.remote("two", leaving, packed(5.0, 0.0)).result(timeout_s=20)
    before = stats().num_dropped_policies
    told = router.report.remote("one", leaving, packed(5.0, math.nan)).result(timeout_s=20)
    assert stats().num_dropped_policies == before + 1
    told = router.report.remote("two", leaving, packed(5.0, 0.0)).result(timeout_s=20)
    assert list(counts(told.policy).values()) == [(10.0, 8.0)]
