"""All choices of one response, merged into one sequence of events, and their SSE encoding."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from magicdec.deployments.errors import ApiError, from_request_error, internal
from magicdec.deployments.measured_requests import Streams
from magicdec.deployments.replica_api import Admitted
from magicdec.deployments.responses import ChoiceText, ResponseFormat
from magicdec.types import Request, RequestError, RequestOutput, Usage

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: ApiError


_Event = tuple[int, Admitted | RequestOutput | _Failure]


class Choices:
    """Runs the stream of every choice at once. `close` cancels what is still running."""

    def __init__(self, dispatcher: Streams, requests: Sequence[Request]) -> None:
        self.usages = [_NO_USAGE] * len(requests)
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._num_open = len(requests)
        self._tasks = [
            asyncio.create_task(self._pump(i, dispatcher, request))
            for i, request in enumerate(requests)
        ]

    async def wait_started(self, timeout_s: float) -> None:
        """Returns once a replica has the first choice, or after `timeout_s`. Raises ApiError.

        A failure here still has its HTTP status: nothing was written yet.
        """
        await self.next(timeout_s)

    async def next(self, timeout_s: float | None) -> tuple[int, RequestOutput] | None:
        """The next output; None for a mere sign of life or `timeout_s` without an event.

        Raises ApiError as soon as one choice fails: the response ends there.
        """
        try:
            async with asyncio.timeout(timeout_s):
                index, event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, _Failure):
            raise event.error
        if isinstance(event, Admitted):
            return None
        self.usages[index] = event.usage
        self._num_open -= event.finish_reason is not None
        return index, event

    @property
    def all_finished(self) -> bool:
        return self._num_open == 0

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, index: int, dispatcher: Streams, request: Request) -> None:
        try:
            async for item in dispatcher.stream(request):
                self._events.put_nowait((index, item))
        except ApiError as error:
            self._events.put_nowait((index, _Failure(error)))
        except RequestError as error:
            self._events.put_nowait((index, _Failure(from_request_error(error))))
        except Exception:
            logger.exception("request %s failed", request.request_id)
            self._events.put_nowait((index, _Failure(internal())))


async def collect(choices: Choices, response: ResponseFormat) -> dict[str, Any]:
    """The whole answer. Raises ApiError."""
    texts = [ChoiceText() for _ in choices.usages]
    try:
        while not choices.all_finished:
            event = await choices.next(None)
            if event is not None:
                index, output = event
                texts[index].add(output)
    finally:
        await choices.close()
    return response.whole(texts, choices.usages)


async def stream_events(
    choices: Choices, response: ResponseFormat, *, with_usage: bool, keep_alive_s: float
) -> AsyncIterator[bytes]:
    """Server-sent events: one write a verify round and choice, then [DONE].

    Rounds may pass without text (what may become a stop string is held back), so keep-alive
    comments go by the time of the last write. A failure becomes an error event, since the status
    line is long gone. Closing the iterator (the client left) cancels every choice.
    """
    started: set[int] = set()
    last_write = time.monotonic()
    try:
        while not choices.all_finished:
            due = last_write + keep_alive_s
            event = await choices.next(max(0.0, due - time.monotonic()))
            if event is not None and _is_written(event[1], response):
                index, output = event
                yield encode(response.chunk(index, output, first=index not in started))
                started.add(index)
            elif time.monotonic() >= due:
                yield KEEP_ALIVE
            else:
                continue
            last_write = time.monotonic()
        if with_usage:
            yield encode(response.usage_chunk(choices.usages))
    except ApiError as error:
        yield encode(error.body())
    finally:
        await choices.close()
    yield DONE


def _is_written(output: RequestOutput, response: ResponseFormat) -> bool:
    return bool(output.text or output.finish_reason or response.with_token_ids)


def encode(body: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
