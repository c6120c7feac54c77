"""Two replicas and API keys: what a client sees when replicas and the router die under it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray

from magicdec.deployments.replica_api import ReplicaDescription
from tests.deployments.conftest import MODEL, AppFactory, ServedApp

KEY = "sk-first"
OTHER_KEY = "sk-second"
BODY: dict[str, Any] = {
    "model": MODEL,
    "prompt": "once upon a time",
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 1.0,
    "seed": 11,
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def two_replicas(run_app: AppFactory, tmp_path_factory: pytest.TempPathFactory) -> ServedApp:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# clients\n{KEY}\n\n{OTHER_KEY}\n")
    return run_app(num_replicas=2, api_keys_file=str(keys))


@pytest.fixture
def app(two_replicas: ServedApp) -> ServedApp:
    """Both replicas are up: the one that a test killed has been replaced."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        health = httpx.get(f"{two_replicas.url}/health").json()
        if health.get("replicas") == 2:
            return two_replicas
        time.sleep(0.2)
    pytest.fail("the second replica did not come back")


@pytest.fixture(scope="module")
def undisturbed(two_replicas: ServedApp) -> "Stream":
    stream = Stream(two_replicas).read()
    assert stream.done and len(stream.token_ids) == 400
    return stream


class Stream:
    """One SSE response, read event by event."""

    def __init__(self, app: ServedApp, **fields: Any) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self._context = httpx.stream(
            "POST",
            f"{app.url}/v1/completions",
            json={**BODY, **fields},
            headers=headers,
            timeout=90,
        )
        self._lines: Iterator[str] = self._context.__enter__().iter_lines()
        self.token_ids: list[int] = []
        self.choices: dict[int, list[int]] = {}
        self.text = ""
        self.usage: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.done = False

    def read(self, at_least: int | None = None) -> "Stream":
        """Up to `at_least` tokens in all, or to the end."""
        while at_least is None or len(self.token_ids) < at_least:
            line = next(self._lines, None)
            if line is None:
                self._context.__exit__(None, None, None)
                return self
            if line.startswith("data: "):
                self._take(line.removeprefix("data: "))
        return self

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        self.error = event.get("error", self.error)
        self.usage = event.get("usage", self.usage)
        for choice in event.get("choices", []):
            self.token_ids += choice["token_ids"]
            self.choices.setdefault(choice["index"], []).extend(choice["token_ids"])
            self.text += choice["text"]


def kill(replica: ReplicaDescription) -> None:
    os.kill(replica.pid, signal.SIGKILL)


def busy(app: ServedApp, without: int | None = None) -> ReplicaDescription:
    """The replica that runs something now; `without` is the pid of one that was killed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        running = [r for r in app.replicas() if r.load.num_running and r.pid != without]
        if running:
            return running[0]
    pytest.fail("no replica is busy")


def test_stream_survives_its_replica(app: ServedApp, undisturbed: Stream) -> None:
    stream = Stream(app).read(at_least=40)
    kill(busy(app))
    stream.read()
    assert stream.error is None and stream.done
    assert stream.token_ids == undisturbed.token_ids
    assert stream.text == undisturbed.text
    assert stream.usage is not None and undisturbed.usage is not None
    assert stream.usage["completion_tokens"] == 400
    assert stream.usage["prompt_tokens"] == undisturbed.usage["prompt_tokens"]
    # Each replica's first token comes from a prefill, not from a round.
    rounds, accepted = (stream.usage["magicdec"][name] for name in ("rounds", "accepted"))
    assert rounds + accepted == pytest.approx(400, abs=3)


def test_whole_answer_survives_its_replica(app: ServedApp, undisturbed: Stream) -> None:
    body = {k: v for k, v in BODY.items() if not k.startswith("stream")}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_whole, app, body)
        kill(busy(app))
        assert answer.result().json()["choices"][0]["token_ids"] == undisturbed.token_ids


def _whole(app: ServedApp, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{app.url}/v1/completions", json=body, headers=headers, timeout=90)


def test_two_deaths_fail_the_stream(app: ServedApp) -> None:
    stream = Stream(app).read(at_least=10)
    first = busy(app)
    kill(first)
    stream.read(at_least=len(stream.token_ids) + 10)
    kill(busy(app, without=first.pid))
    stream.read()
    assert stream.error is not None
    assert stream.error["type"] == "server_error"
    assert stream.error["code"] == "replica_died_twice"
    assert stream.done
    assert len(stream.token_ids) < 400


def test_several_choices_survive_together(app: ServedApp) -> None:
    prompts = ["one", "two", "three", "four"]
    fields: dict[str, Any] = {"prompt": prompts, "max_tokens": 200}
    undisturbed = Stream(app, **fields).read().choices
    stream = Stream(app, **fields).read(at_least=40)
    kill(busy(app))
    assert stream.read().choices == undisturbed


def test_stream_survives_the_router(app: ServedApp, undisturbed: Stream) -> None:
    stream = Stream(app).read(at_least=10)
    router = next(
        a for a in ray.util.list_named_actors(all_namespaces=True) if "Router" in a["name"]
    )
    ray.kill(ray.get_actor(router["name"], namespace=router["namespace"]))
    assert Stream(app, max_tokens=20).read().token_ids == undisturbed.token_ids[:20]
    assert stream.read().token_ids == undisturbed.token_ids


def test_api_keys(app: ServedApp) -> None:
    assert [m.id for m in app.client(KEY).models.list()] == [MODEL]
    assert [m.id for m in app.client(OTHER_KEY).models.list()] == [MODEL]
    for wrong in ("sk-wrong", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError) as caught:
            app.client(wrong).completions.create(model=MODEL, prompt="a", max_tokens=1)
        assert caught.value.code == "invalid_api_key"
    missing = httpx.post(f"{app.url}/v1/completions", json={})
    assert missing.status_code == 401
    assert httpx.get(f"{app.url}/health").status_code == 200


def test_both_replicas_are_used(app: ServedApp) -> None:
    streams = [Stream(app).read(at_least=1) for _ in range(4)]
    assert [replica.load.num_running for replica in app.replicas()] == [2, 2]
    assert len({tuple(stream.read().token_ids) for stream in streams}) == 1
