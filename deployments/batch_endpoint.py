"""The stage of Ray Data that has rows answered by a running server, and what that server serves."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from magicdec.deployments.batch_outcome import Outcome, answer_item, failed
from magicdec.deployments.batch_output import RowResult
from magicdec.deployments.batch_row import BatchRow, RowDefaults, row_seed
from magicdec.deployments.errors import ApiError, from_request_error
from magicdec.deployments.settings import SettingsError
from magicdec.types import RequestError

TRY_AGAIN = (429, 502, 503, 504)
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
ANSWER_TIMEOUT_S = 3600.0  # one long answer on a slow machine
CONNECT_TIMEOUT_S = 10.0
SERVED_S = 2 * CONNECT_TIMEOUT_S  # a try that took longer did not only wait


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of OpenAI's API. `patience_s`: for how long a row waits for one that is away."""

    url: str  # without /v1
    api_key: str | None
    patience_s: float

    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    @classmethod
    def of(cls, url: str, api_key: str | None, patience_s: float) -> "Endpoint":
        """With or without /v1. Raises SettingsError."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise SettingsError(f"--endpoint {url!r} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise SettingsError(f"--endpoint must be an http(s) URL, got {url!r}")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key, patience_s)


def served_models(endpoint: Endpoint) -> tuple[str, ...]:
    """What the server lists. Raises SettingsError where it does not answer."""
    url = f"{endpoint.url}/v1/models"
    try:
        answer = httpx.get(url, headers=endpoint.headers(), timeout=CONNECT_TIMEOUT_S)
        answer.raise_for_status()
        names = tuple(str(entry["id"]) for entry in answer.json()["data"])
    except httpx.HTTPStatusError as error:
        raise SettingsError(f"{url} answers {error.response.status_code}") from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise SettingsError(f"{url} does not answer: {reason}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{url} does not answer as OpenAI's API does") from error
    if not names:
        raise SettingsError(f"{url} lists no model")
    return names


class EndpointCaller:
    """One process, many rows at a time, over one client's connections."""

    def __init__(self, endpoint: Endpoint, defaults: RowDefaults) -> None:
        self._endpoint = endpoint
        self._defaults = defaults
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None)
        self._client = httpx.AsyncClient(
            base_url=endpoint.url, headers=endpoint.headers(), limits=limits, timeout=timeout
        )

    async def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        """See answer_item."""
        return await answer_item(item, self._defaults, self._outcome)

    async def _outcome(self, row: BatchRow, key: str) -> Outcome:
        if row.body.get("stream"):
            wrong = RequestError("stream must be false or absent in a batch", param="stream")
            return Outcome(failed(row, key, from_request_error(wrong)))
        body = {"seed": row_seed(key), **row.body}
        give_up, pause_s = time.monotonic() + self._endpoint.patience_s, FIRST_PAUSE_S
        while True:
            asked_s, started = None, time.monotonic()
            try:
                answer = await self._client.post(row.url, json=body)
                if answer.status_code not in TRY_AGAIN:
                    return Outcome(_result(row, key, answer))
                reason = f"{self._endpoint.url} answers {answer.status_code}"
                asked_s = _retry_after(answer)
            except httpx.TransportError as error:
                reason = f"{self._endpoint.url} does not answer: {error or type(error).__name__}"
            if time.monotonic() - started > SERVED_S:  # the server had it
                give_up = time.monotonic() + self._endpoint.patience_s
            if time.monotonic() > give_up:
                return Outcome(None, unreachable=reason)
            await asyncio.sleep(pause_s if asked_s is None else asked_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _result(row: BatchRow, key: str, answer: httpx.Response) -> RowResult:
    try:
        body = answer.json()
    except ValueError:
        body = {"error": {"message": f"not JSON: {answer.text[:200]!r}"}}
    if answer.status_code != httpx.codes.OK or not isinstance(body, dict) or "choices" not in body:
        return failed(row, key, _error(answer.status_code, body))
    usage = body.get("usage") or {}
    rounds = usage.get("magicdec") or {}  # of this project's servers
    response = {
        "status_code": answer.status_code,
        "request_id": str(answer.headers.get("x-request-id") or body.get("id") or ""),
        "body": body,
    }
    return RowResult(
        row.custom_id,
        key,
        response,
        None,
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        int(rounds.get("rounds") or 0),
        int(rounds.get("accepted") or 0),
    )


def _error(status: int, body: Any) -> ApiError:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ApiError(status, f"the server answers {status}", kind="server_error")
    return ApiError(
        status,
        str(error.get("message")),
        kind=str(error.get("type") or "server_error"),
        param=error.get("param"),
        code=error.get("code"),
    )


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return min(max(float(answer.headers["retry-after"]), 0.0), 10 * MAX_PAUSE_S)
    except (KeyError, ValueError):
        return None
