"""Requests as their clients see them: how long they wait, and what becomes of them."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from magicdec.cluster import metric_table as m
from magicdec.cluster.metrics import Metric
from magicdec.deployments.dispatch import Item
from magicdec.deployments.errors import ApiError
from magicdec.deployments.replica_api import Admitted
from magicdec.types import Request, RequestError, RequestOutput

REFUSED_STATUS = 400  # of what an engine refuses


class Streams(Protocol):
    """What a Dispatcher does."""

    def stream(self, request: Request) -> AsyncIterator[Item]: ...


class Sink(Protocol):
    """What a Recorder does with the metrics of requests."""

    def count(self, metric: Metric, amount: float, *labels: str) -> None: ...

    def observe(self, metric: Metric, value: float) -> None: ...


class MeasuredRequests:
    """Streams through another Streams, and measures what passes. Nothing else is changed.

    A client that leaves ends its request without an answer and without an error.
    """

    def __init__(
        self, inner: Streams, sink: Sink, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner = inner
        self._sink = sink
        self._clock = clock

    async def stream(self, request: Request) -> AsyncIterator[Item]:
        """See Dispatcher.stream."""
        arrived = self._clock()
        last: float | None = None  # output
        admitted = False
        try:
            async for item in self._inner.stream(request):
                now = self._clock()
                if isinstance(item, Admitted):
                    if admitted:
                        self._sink.count(m.RESUMES, 1)
                    else:
                        self._sink.observe(m.QUEUE_TIME, now - arrived)
                    admitted = True
                else:
                    self._add(item, arrived, last, now)
                    last = now
                yield item
        except ApiError as error:
            self._sink.count(m.ERRORS, 1, str(error.status))
            raise
        except RequestError:
            self._sink.count(m.ERRORS, 1, str(REFUSED_STATUS))
            raise

    def _add(self, output: RequestOutput, arrived: float, last: float | None, now: float) -> None:
        sink, usage = self._sink, output.usage
        if last is None:
            sink.observe(m.FIRST_TOKEN, now - arrived)
        else:
            sink.observe(m.TOKEN_GAP, now - last)
        if output.finish_reason is not None:
            sink.observe(m.END_TO_END, now - arrived)
            sink.observe(m.PROMPT_LENGTH, usage.prompt_tokens)
            sink.observe(m.ANSWER_LENGTH, usage.completion_tokens)
            sink.count(m.SUCCESSES, 1, output.finish_reason.value)
