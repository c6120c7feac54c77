"""Latencies as clients see them, over streams whose times are known."""

from collections.abc import AsyncIterator

import pytest

from magicdec.cluster import metric_table as m
from magicdec.cluster.metrics import Metric
from magicdec.deployments.dispatch import Item
from magicdec.deployments.errors import ApiError
from magicdec.deployments.measured_requests import MeasuredRequests
from magicdec.deployments.replica_api import Admitted
from magicdec.types import FinishReason, Request, RequestError, RequestOutput, Usage

REQUEST = Request("r", (1, 2, 3))


class Sink:
    def __init__(self) -> None:
        self.told: list[list[str | float]] = []

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        self.told.append([metric.name, amount, *labels])

    def observe(self, metric: Metric, value: float) -> None:
        self.told.append([metric.name, round(value, 6)])

    def of(self, metric: Metric) -> list[list[str | float]]:
        return [values for name, *values in self.told if name == metric.name]


class Told:
    """Streams what it is given at the times given with it."""

    def __init__(self, *items: tuple[float, Item | Exception]) -> None:
        self._items = items
        self.now = 100.0

    async def stream(self, request: Request) -> AsyncIterator[Item]:
        for at, item in self._items:
            self.now = 100.0 + at
            if isinstance(item, Exception):
                raise item
            yield item


def output(num_tokens: int, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput("r", (7,), "x", Usage(3, num_tokens), reason)


async def measure(*items: tuple[float, Item | Exception]) -> Sink:
    sink, told = Sink(), Told(*items)
    measured = MeasuredRequests(told, sink, lambda: told.now)
    passed = [item async for item in measured.stream(REQUEST)]
    assert passed == [item for _, item in items]
    return sink


async def test_an_answer_is_measured_from_arrival_to_end() -> None:
    end = output(3, FinishReason.LENGTH)
    sink = await measure((2.0, Admitted("a")), (5.0, output(1)), (5.5, output(2)), (6.5, end))
    assert sink.of(m.QUEUE_TIME) == [[2.0]]
    assert sink.of(m.FIRST_TOKEN) == [[5.0]]
    assert sink.of(m.TOKEN_GAP) == [[0.5], [1.0]]
    assert sink.of(m.END_TO_END) == [[6.5]]
    assert sink.of(m.PROMPT_LENGTH) == [[3]] and sink.of(m.ANSWER_LENGTH) == [[3]]
    assert sink.of(m.SUCCESSES) == [[1, "length"]]
    assert not sink.of(m.RESUMES) and not sink.of(m.ERRORS)


async def test_a_stream_that_goes_on_elsewhere_is_a_resume_and_one_answer() -> None:
    end = output(2, FinishReason.STOP)
    sink = await measure((1.0, Admitted("a")), (2.0, output(1)), (9.0, Admitted("b")), (10.0, end))
    assert sink.of(m.RESUMES) == [[1]]
    assert sink.of(m.QUEUE_TIME) == [[1.0]]
    assert sink.of(m.TOKEN_GAP) == [[8.0]]  # what the client saw
    assert sink.of(m.SUCCESSES) == [[1, "stop"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ApiError(429, "full"), "429"), (RequestError("too long", param="prompt"), "400")],
)
async def test_an_error_is_counted_by_its_status_and_passed_on(
    error: Exception, status: str
) -> None:
    sink, told = Sink(), Told((1.0, error))
    with pytest.raises(type(error)):
        _ = [item async for item in MeasuredRequests(told, sink).stream(REQUEST)]
    assert sink.told == [[m.ERRORS.name, 1, status]]


async def test_a_client_that_leaves_is_neither_an_answer_nor_an_error() -> None:
    sink, told = Sink(), Told((1.0, Admitted("a")), (2.0, output(1)), (3.0, output(2)))
    stream = MeasuredRequests(told, sink, lambda: told.now).stream(REQUEST)
    await anext(stream)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert not sink.of(m.SUCCESSES) and not sink.of(m.ERRORS)
