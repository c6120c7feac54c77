"""Dispatch and failover over handles that fail as Serve's do, without Ray processes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError, Metadata  # type: ignore[import-untyped]
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import RayServeException

from magicdec.deployments import dispatch
from magicdec.deployments.dispatch import Dispatcher
from magicdec.deployments.errors import ApiError
from magicdec.deployments.replica_api import Admitted, EngineDied, EngineUnavailable
from magicdec.routing.prefix_affinity import prefix_hashes
from magicdec.routing.settings import Ask, Assignment
from magicdec.types import FinishReason, Request, RequestOutput, SamplingParams, Usage

REQUEST = Request("client-id", tuple(range(300)), SamplingParams(max_tokens=40))
Step = Admitted | Exception | tuple[int, ...]  # tuple: an output with these token ids

ROUTER_FAILURES = [
    AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata()),
    AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()),
    RuntimeError("the handle is closed"),
    RayServeException("the deployment is unavailable"),
    TimeoutError(),
]


class Method:
    def __init__(self, answer: Callable[..., Any]) -> None:
        self.remote = answer


class Calls:
    """One call of `generate`: `steps`, the last output with its finish reason."""

    def __init__(self, request: Request, steps: list[Step]) -> None:
        self._request = request
        self._steps = list(steps)

    def __aiter__(self) -> "Calls":
        return self

    async def __anext__(self) -> Admitted | RequestOutput:
        if not self._steps:
            raise StopAsyncIteration
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, Admitted):
            return step
        reason = None if self._steps else FinishReason.LENGTH
        return RequestOutput(self._request.request_id, step, "", Usage(3, len(step)), reason)

    def cancel(self) -> None:
        pass


Answer = Assignment | Exception | None


class Cluster:
    """Router and replicas: the n-th call of `generate` follows the n-th list of steps, the n-th ask
    gets the n-th answer, and when these are used up the first replica that may be chosen."""

    def __init__(
        self,
        attempts: list[list[Step]],
        router_fails: Exception | None = None,
        answers: tuple[Answer, ...] = (),
    ) -> None:
        self._attempts = list(attempts)
        self._router_fails = router_fails
        self._answers = list(answers)
        self.requests: list[Request] = []
        self.targets: list[str | None] = []
        self.hashes: list[tuple[int, ...]] = []
        self.asks: list[Ask] = []
        self.cancelled: list[str] = []
        self.dead: list[str] = []
        self.assign = Method(self._assign)
        self.cancel = Method(self.cancelled.append)
        self.mark_dead = Method(self._mark_dead)
        self.generate = Method(self._generate)

    def options(self, *, stream: bool) -> "Cluster":
        assert stream
        return self

    async def answer(self) -> list[RequestOutput]:
        dispatcher = Dispatcher(cast(Any, self), cast(Any, self), "who", replica_wait_s=5)
        return [o async for o in dispatcher.stream(REQUEST) if isinstance(o, RequestOutput)]

    def _assign(self, ask: Ask, wait_s: float) -> Awaitable[Assignment | None]:
        async def answer() -> Assignment | None:
            if self._router_fails is not None:
                raise self._router_fails
            self.asks.append(ask)
            if self._answers:
                given = self._answers.pop(0)
                if isinstance(given, Exception):
                    raise given
                return given
            chosen = next(name for name in "abcd" if name not in ask.exclude)
            return Assignment(ask.request_id, chosen)

        return answer()

    def _mark_dead(self, replica_id: str) -> Awaitable[None]:
        async def answer() -> None:
            if self._router_fails is not None:
                raise self._router_fails
            self.dead.append(replica_id)

        return answer()

    def _generate(
        self, request: Request, *, target: str | None, prefix_hashes: tuple[int, ...]
    ) -> Calls:
        self.requests.append(request)
        self.hashes.append(prefix_hashes)
        self.targets.append(target)
        return Calls(request, self._attempts.pop(0))


def unreachable() -> ActorUnavailableError:
    return ActorUnavailableError("connection refused", None)


async def test_a_death_resumes_elsewhere_beyond_the_queue_bound() -> None:
    cluster = Cluster([[Admitted("a"), (7, 8), EngineDied("step")], [Admitted("b"), (9,)]])
    outputs = await cluster.answer()
    assert [o.token_ids for o in outputs] == [(7, 8), (9,)]
    assert [(ask.exclude, ask.resumed) for ask in cluster.asks] == [((), False), (("a",), True)]
    assert [ask.num_context_tokens for ask in cluster.asks] == [300, 302]
    assert [ask.max_tokens for ask in cluster.asks] == [40, 38]
    assert cluster.dead == ["a"]
    assert cluster.requests[1].emitted_token_ids == (7, 8)


async def test_each_attempt_has_its_own_id_and_the_client_sees_one() -> None:
    cluster = Cluster([[Admitted("a"), (7,), EngineDied("step")], [Admitted("b"), (9,)]])
    outputs = await cluster.answer()
    assert len({request.request_id for request in cluster.requests}) == 2
    assert {output.request_id for output in outputs} == {"client-id"}


@pytest.mark.parametrize("failure", ROUTER_FAILURES, ids=repr)
async def test_requests_outlive_whatever_the_router_raises(failure: Exception) -> None:
    attempts: list[list[Step]] = [[Admitted("a"), (7,), EngineDied("step")], [Admitted("b"), (8,)]]
    cluster = Cluster(attempts, router_fails=failure)
    assert [o.token_ids for o in await cluster.answer()] == [(7,), (8,)]
    assert cluster.targets == [None, None]


async def test_a_loss_before_admission_blames_nobody() -> None:
    died: list[Step] = [Admitted("b"), (7,), EngineDied("step")]
    cluster = Cluster([[unreachable()], died, [Admitted("c"), (8,)]])
    assert [o.token_ids for o in await cluster.answer()] == [(7,), (8,)]
    assert cluster.dead == ["b"]
    assert cluster.targets == ["a", "b", "c"]


async def test_three_losses_without_a_death_are_retryable() -> None:
    cluster = Cluster([[unreachable()] for _ in range(3)])
    with pytest.raises(ApiError) as caught:
        await cluster.answer()
    assert (caught.value.status, caught.value.code) == (503, "replica_unavailable")
    assert cluster.dead == []


async def test_a_stream_that_serve_gives_up_is_resumed() -> None:
    lost = RayServeException("the replica is no longer available")
    cluster = Cluster([[Admitted("a"), (7,), lost], [Admitted("b"), (8,)]])
    assert [o.token_ids for o in await cluster.answer()] == [(7,), (8,)]


ANSWER: list[list[Step]] = [[Admitted("a"), (7,)]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts."""
    monkeypatch.setattr(dispatch, "RETRY_PERIOD_S", 0.0)


async def test_the_router_is_told_what_it_decides_by() -> None:
    cluster = Cluster(ANSWER)
    await cluster.answer()
    (ask,) = cluster.asks
    hashes = prefix_hashes(REQUEST.prompt_token_ids)
    assert (ask.key, ask.prefix_hashes) == ("who", hashes)
    assert cluster.hashes == [hashes] and len(hashes) == 1
    assert ask.request_id == cluster.requests[0].request_id


async def test_a_request_that_waits_asks_until_it_is_sent() -> None:
    cluster = Cluster(ANSWER, answers=(None, None))
    assert len(await cluster.answer()) == 1
    assert len({ask.request_id for ask in cluster.asks}) == 1
    waited = [ask.waited_s for ask in cluster.asks]
    assert len(waited) == 3 and waited == sorted(waited)


@pytest.mark.parametrize("failure", ROUTER_FAILURES, ids=repr)
async def test_a_request_that_waits_outlives_the_router(
    impatient: None, failure: Exception
) -> None:
    """It asks the next one, with the time that it has waited already."""
    cluster = Cluster(ANSWER, answers=(None, failure, failure, None))
    assert len(await cluster.answer()) == 1
    assert cluster.targets == ["a"] and len(cluster.asks) == 5


async def test_a_router_that_stays_away_does_not_keep_anyone(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "ROUTER_RESTART_S", 0.0)
    cluster = Cluster(ANSWER, answers=(None, RuntimeError("gone")))
    assert len(await cluster.answer()) == 1
    assert cluster.targets == [None]


async def test_a_refusal_says_when_to_come_back() -> None:
    cluster = Cluster([], answers=(Assignment("client-id#1", None, retry_after_s=7.4),))
    with pytest.raises(ApiError) as caught:
        await cluster.answer()
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "7")


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it() -> None:
    cluster, asked = Cluster([]), asyncio.Event()

    async def no_room(ask: Ask, wait_s: float) -> None:
        asked.set()
        await asyncio.sleep(wait_s)

    cluster.assign = Method(no_room)
    waiting = asyncio.create_task(cluster.answer())
    await asked.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cluster.cancelled == ["client-id#1"]


async def test_a_replica_that_refuses_is_not_asked_again(impatient: None) -> None:
    cluster = Cluster([[EngineUnavailable("stopping")], [Admitted("b"), (8,)]])
    assert len(await cluster.answer()) == 1
    assert cluster.targets == ["a", "b"] and cluster.dead == []
    assert [ask.resumed for ask in cluster.asks] == [False, False]
