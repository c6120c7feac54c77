"""A replica's ledger of its requests: what a report holds, and when it is due."""

import asyncio

import pytest

from magicdec.config import SchedulerConfig
from magicdec.deployments import replica_report
from magicdec.deployments.replica_report import ReportAnswer, Requests
from magicdec.routing.reports import FinishedRequest, LiveRequest, find_flaw
from magicdec.stats import EngineLoad
from magicdec.types import FinishReason, Request, RequestOutput, SamplingParams, Usage

LOAD = EngineLoad(1, 0, 500, 1000)


def request(name: str = "r", emitted: tuple[int, ...] = ()) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=50), emitted)


def output(done: int, rounds: int = 1, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput("r", (5,), "", Usage(3, done, num_rounds=rounds), reason)


def make() -> Requests:
    return Requests(SchedulerConfig(max_num_seqs=4, max_batch_tokens=128))


async def test_a_request_is_reported_from_its_arrival_to_its_end() -> None:
    requests = make()
    requests.begin(request(), ())
    report = requests.report(LOAD)
    assert report.live == (LiveRequest("r", 0, 50),)
    assert (report.load, report.max_num_seqs, report.max_batch_tokens) == (LOAD, 4, 128)
    requests.add(output(7))
    assert requests.report(LOAD).live == (LiveRequest("r", 7, 50),)
    requests.add(output(9, reason=FinishReason.STOP))
    requests.end("r")
    report = requests.report(LOAD)
    assert report.live == () and report.finished == (FinishedRequest("r", 3, 9, 50),)
    assert find_flaw(report) is None


async def test_a_resumed_request_begins_with_what_it_has() -> None:
    requests = make()
    requests.begin(request(emitted=(4, 4)), ())
    assert requests.report(LOAD).live == (LiveRequest("r", 2, 50),)


async def test_a_request_given_up_is_in_no_list() -> None:
    requests = make()
    requests.begin(request(), ())
    requests.end("r")
    report = requests.report(LOAD)
    assert report.live == () and report.finished == ()


async def test_ends_are_repeated_until_a_report_was_taken() -> None:
    requests = make()
    requests.begin(request(), ())
    requests.add(output(9, reason=FinishReason.STOP))
    lost, taken = requests.report(LOAD), requests.report(LOAD)
    assert lost.finished == taken.finished != ()
    assert taken.number > lost.number
    requests.was_taken(taken, ReportAnswer(True))
    assert requests.report(LOAD).finished == ()


async def test_a_router_that_is_new_is_told_prefixes_once() -> None:
    requests = make()
    for name, hashes in (("a", (1, 2)), ("b", (7,)), ("c", (1, 2)), ("d", ())):
        requests.begin(request(name), hashes)
    first = requests.report(LOAD)
    assert first.prefixes == ((7,), (1, 2))
    requests.was_taken(first, ReportAnswer(False))
    assert requests.report(LOAD).prefixes == ()
    requests.was_taken(requests.report(LOAD), ReportAnswer(True))
    requests.was_taken(requests.report(LOAD), ReportAnswer(False))  # another router
    assert requests.report(LOAD).prefixes == ((7,), (1, 2))


async def test_prefixes_are_bounded() -> None:
    requests = make()
    for i in range(300):
        requests.begin(request(str(i)), (i,))
    assert len(requests.report(LOAD).prefixes) == 256


@pytest.mark.parametrize("news", ["first token", "end", "nothing"])
async def test_first_tokens_and_ends_are_reported_soon(
    monkeypatch: pytest.MonkeyPatch, news: str
) -> None:
    monkeypatch.setattr(replica_report, "REPORT_PERIOD_S", 0.4)
    monkeypatch.setattr(replica_report, "LEAST_REPORT_PERIOD_S", 0.02)
    requests = make()
    requests.begin(request(), ())
    requests.report(LOAD)
    loop = asyncio.get_running_loop()
    start = loop.time()
    match news:
        case "first token":
            requests.add(output(1, rounds=0))
        case "end":
            requests.end("r")
        case _:
            requests.add(output(5))
    await requests.wait_for_news()
    elapsed = loop.time() - start
    assert elapsed >= 0.38 if news == "nothing" else 0.015 < elapsed < 0.3


def test_a_replica_that_drains_says_so() -> None:
    requests = Requests(SchedulerConfig(max_num_seqs=4, max_batch_tokens=128))
    assert not requests.report(LOAD).draining
    assert requests.report(LOAD, draining=True).draining
