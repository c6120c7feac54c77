"""The router benchmark's client: streamed completions, open loop or closed, over HTTP."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import httpx

from magicdec.simulation.trace import TraceRequest
from tests.benchmarks.bench_router_trace import TokenIds

_LEAD_S = 0.5  # before the first arrival: every task is asleep by then
_TIMEOUT = httpx.Timeout(None, connect=30.0)


@dataclass(frozen=True, slots=True)
class Call:
    """One completion to be asked for. `number` travels as the seed, so that a replica can say which
    of them it had; at temperature 0 a seed changes nothing."""

    number: int
    prompt: TokenIds
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Monotonic clock. `due` is when it was to be sent; `first` is None where no token came."""

    due: float
    sent: float
    first: float | None
    done: float
    num_output_tokens: int
    cached_tokens: int
    error: str | None = None


class Client:
    """Talks to one server; gives an answer up that has not ended `timeout_s` after it was sent."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        self._timeout_s = timeout_s

    def open_loop(
        self, requests: Sequence[TraceRequest], prompts: Sequence[TokenIds]
    ) -> list[Answer]:
        """Sends each at its time whatever becomes of the others. The answers in the order of the
        requests."""
        return asyncio.run(self._open_loop(requests, prompts))

    def closed_loop(self, calls: Sequence[Call], num_at_once: int) -> list[Answer]:
        """Keeps so many going until none is left. The answers in the order of the calls."""
        return asyncio.run(self._closed_loop(calls, num_at_once))

    async def _open_loop(
        self, requests: Sequence[TraceRequest], prompts: Sequence[TokenIds]
    ) -> list[Answer]:
        async with _http() as http:
            start = time.monotonic() + _LEAD_S
            asked = [
                self._ask(http, Call(i, prompt, request.max_tokens), start + request.arrival_s)
                for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
            ]
            return await asyncio.gather(*asked)

    async def _closed_loop(self, calls: Sequence[Call], num_at_once: int) -> list[Answer]:
        seats = asyncio.Semaphore(num_at_once)

        async def ask(call: Call) -> Answer:
            async with seats:
                return await self._ask(http, call, time.monotonic())

        async with _http() as http:
            return await asyncio.gather(*map(ask, calls))

    async def _ask(self, http: httpx.AsyncClient, call: Call, due: float) -> Answer:
        body = {  # encoded before it is due
            "model": self._model,
            "prompt": list(call.prompt),
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "seed": call.number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        request = http.build_request("POST", self._url, json=body)
        await asyncio.sleep(due - time.monotonic())
        return await _answer(http, request, due, self._timeout_s)


async def _answer(
    http: httpx.AsyncClient, request: httpx.Request, due: float, timeout_s: float
) -> Answer:
    sent = time.monotonic()
    first: float | None = None
    usage: tuple[int, int] | None = None
    error: str | None = None
    try:
        async with asyncio.timeout(timeout_s), aclosing(await http.send(request, stream=True)) as r:
            if r.status_code != 200:
                error = f"{r.status_code}: {(await r.aread())!r}"
            async for line in r.aiter_lines():
                event = parse_event(line)
                if event is None:
                    continue
                if event.has_tokens and first is None:
                    first = time.monotonic()
                usage, error = event.usage or usage, event.error or error
    except TimeoutError:
        error = f"no end after {timeout_s:.0f} s"
    except httpx.HTTPError as failure:
        error = repr(failure)
    if usage is None and error is None:
        error = "the stream ended without its usage"
    num_output, cached = usage or (0, 0)
    return Answer(due, sent, first, time.monotonic(), num_output, cached, error)


@dataclass(frozen=True, slots=True)
class Event:
    """`usage`: output tokens and cached prompt tokens, in the last chunk alone."""

    has_tokens: bool = False
    usage: tuple[int, int] | None = None
    error: str | None = None


def parse_event(line: str) -> Event | None:
    """One line of the stream; None for a comment, an empty line or the end."""
    if not line.startswith("data: {"):
        return None
    chunk = json.loads(line[6:])
    if "error" in chunk:
        return Event(error=str(chunk["error"].get("message", chunk["error"])))
    usage = chunk.get("usage")
    return Event(
        has_tokens=any(choice.get("token_ids") for choice in chunk.get("choices", ())),
        usage=usage
        and (usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]),
    )


def _http() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=_TIMEOUT, limits=limits)
