"""Rows answered by a running server: the served application, and one that fails in every way."""

import asyncio
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from magicdec.deployments.batch_answered import AnsweredIndex
from magicdec.deployments.batch_dataset import Stage, outcomes
from magicdec.deployments.batch_endpoint import Endpoint, EndpointCaller, served_models
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_row import BatchRow, row_seed
from magicdec.deployments.batch_sources import JsonLines
from magicdec.deployments.settings import SettingsError
from tests.deployments.batch_rows import (
    DEFAULTS,
    chat,
    completion,
    good_rows,
    read_lines,
    run_job,
    write_jsonl,
)
from tests.deployments.conftest import MODEL, AppFactory

Reply = tuple[int, dict[str, str], Any]  # status, headers, body
OK: Reply = (200, {}, {"id": "x", "choices": [{"text": "hi"}], "usage": {"completion_tokens": 2}})


def test_the_served_application_answers_a_batch(run_app: AppFactory, tmp_path: Path) -> None:
    app = run_app()
    endpoint = Endpoint.of(f"{app.url}/v1/", None, patience_s=30.0)
    assert served_models(endpoint) == (MODEL,)
    records = [
        *[completion(f"row-{i}", f"story {i}", temperature=1.0) for i in range(6)],
        chat("chat"),
        completion("too-long", "x" * 600),
    ]
    rows = write_jsonl(tmp_path / "in.jsonl", records)
    source = JsonLines(str(rows))

    def answerer(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        return outcomes(source, DEFAULTS, answered, Stage(EndpointCaller, endpoint, 1, 4))

    job = run_job(rows, tmp_path / "out.jsonl", answerer)
    lines = {line["custom_id"]: line for line in read_lines(tmp_path / "out.jsonl")}
    assert sorted(lines) == sorted(record["custom_id"] for record in records)
    assert job.num_errors == 1
    error = lines["too-long"]["error"]
    assert (error["code"], error["status_code"]) == ("context_length_exceeded", 400)
    row = good_rows(source)[3]
    body = {**row.body, "seed": row_seed(row.key(DEFAULTS))}
    asked = httpx.post(f"{app.url}{row.url}", json=body, timeout=60).json()
    answered = lines[row.custom_id]["response"]["body"]
    assert answered["choices"] == asked["choices"]


class ScriptedServer:
    """Gives the replies in turn, the last one for ever; counts what it was asked."""

    def __init__(self, replies: list[Reply]) -> None:
        self.bodies: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                server.bodies.append(json.loads(raw))
                status, headers, body = replies[min(len(server.bodies), len(replies)) - 1]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


ServerFactory = Callable[..., ScriptedServer]


@pytest.fixture
def serve_replies() -> Iterator[ServerFactory]:
    servers: list[ScriptedServer] = []

    def make(*replies: Reply) -> ScriptedServer:
        servers.append(ScriptedServer(list(replies)))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(url: str, patience_s: float = 20.0, **body: Any) -> Outcome:
    fields = {"model": MODEL, "prompt": "a", **body}
    row = BatchRow("in.jsonl:1", "a", "/v1/completions", fields)

    async def call() -> Outcome:
        caller = EndpointCaller(Endpoint.of(url, "sk-key", patience_s), DEFAULTS)
        outcome: Outcome = pickle.loads((await caller({"row": pickle.dumps(row)}))["outcome"])
        return outcome

    return asyncio.run(call())


def test_a_busy_server_is_asked_again(serve_replies: ServerFactory) -> None:
    busy: Reply = (429, {"Retry-After": "0"}, {})
    away: Reply = (503, {"Retry-After": "0"}, b"gone")
    server = serve_replies(busy, away, OK)
    result = ask(server.url).result
    assert result is not None and result.error is None and result.completion_tokens == 2
    assert len(server.bodies) == 3


def test_each_try_has_the_seed_of_the_row(serve_replies: ServerFactory) -> None:
    server = serve_replies((503, {"Retry-After": "0"}, {}), OK)
    ask(server.url)
    first, second = (body["seed"] for body in server.bodies)
    assert first == second < 2**48
    ask(server.url, seed=5)
    assert server.bodies[-1]["seed"] == 5


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        ((400, {}, {"error": {"message": "no", "code": "bad", "type": "t"}}), "bad", "no"),
        ((500, {}, b"<html>"), "server_error", "not JSON: '<html>'"),
        ((200, {}, {"hello": 1}), "server_error", "the server answers 200"),
    ],
)
def test_a_refusal_is_the_rows_error(
    serve_replies: ServerFactory, reply: Reply, code: str, message: str
) -> None:
    result = ask(serve_replies(reply).url).result
    assert result is not None and result.response is None and result.error is not None
    assert (result.error["code"], result.error["status_code"]) == (code, reply[0])
    assert message in result.error["message"]


def test_a_server_that_is_gone_stops_the_job_and_fails_no_row() -> None:
    outcome = ask("http://127.0.0.1:9", patience_s=0.0)
    assert outcome.result is None and outcome.unreachable is not None
    assert "http://127.0.0.1:9 does not answer" in outcome.unreachable


def test_a_stream_is_refused_without_asking() -> None:
    result = ask("http://127.0.0.1:9", stream=True).result
    assert result is not None and result.error is not None
    assert result.error["param"] == "stream"


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="--endpoint"):
        Endpoint.of(url, None, 1.0)
