"""Grafana's HTTP API as far as it is used, with its status codes: a server in this process."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "a-service-account"
Answer = tuple[int, dict[str, Any]]


class Stub(ThreadingHTTPServer):
    """`requests`: method and path of everything that was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fails_with: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/grafana"

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.requests if method != "GET"]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        match method, path.split("/"):
            case "GET", ["folders", uid]:
                return _found(self.folders.get(uid))
            case "POST", ["folders"]:
                self.folders[body["uid"]] = body
            case "PUT", ["folders", uid]:
                self.folders[uid] |= body
            case "GET", ["datasources", "uid", uid]:
                return _found(self.sources.get(uid))
            case "POST", ["datasources"]:
                self.sources[body["uid"]] = body
            case "PUT", ["datasources", "uid", uid]:
                self.sources[uid] = body
            case "GET", ["dashboards", "uid", uid]:
                there = self.dashboards.get(uid)
                return _found(None if there is None else {"dashboard": there, "meta": {}})
            case "POST", ["dashboards", "db"]:
                return self._write_dashboard(body)
            case _:
                return 404, {"message": f"no route {method} {path}"}
        return 200, body

    def _write_dashboard(self, body: dict[str, Any]) -> Answer:
        """As Grafana: the folder must be there, and it sets id and version itself."""
        wanted = body["dashboard"]
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        there = self.dashboards.get(wanted["uid"])
        if there is not None and not body.get("overwrite"):
            return 412, {"message": "version-mismatch", "status": "version-mismatch"}
        version = 1 if there is None else there["version"] + 1
        self.dashboards[wanted["uid"]] = {**wanted, "id": 7, "version": version}
        return 200, {"status": "success", "uid": wanted["uid"], "version": version}


def _found(what: dict[str, Any] | None) -> Answer:
    return (404, {"message": "not found"}) if what is None else (200, what)


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null") or {}
        path = self.path.removeprefix("/grafana/api/")
        self.server.requests.append((self.command, path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, answer = 401, {"message": "invalid API key"}
        elif self.server.fails_with is not None:
            status, answer = self.server.fails_with, {"message": "database is locked"}
        else:
            status, answer = self.server.answer(self.command, path, body)
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


@contextmanager
def running_stub() -> Iterator[Stub]:
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()
