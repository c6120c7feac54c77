"""Dispatch and failover over handles that fail as Serve's do, without Ray processes."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError, Metadata  # type: ignore[import-untyped]
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import RayServeException

from magicdec.admission import Assignment
from magicdec.deployments.dispatch import Dispatcher
from magicdec.deployments.errors import ApiError
from magicdec.deployments.replica_api import Admitted, EngineDied
from magicdec.types import FinishReason, Request, RequestOutput, Usage

REQUEST = Request("client-id", (1, 2, 3))
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


class Cluster:
    """Router and replicas: the n-th call of `generate` follows the n-th list of steps."""

    def __init__(self, attempts: list[list[Step]], router_fails: Exception | None = None) -> None:
        self._attempts = list(attempts)
        self._router_fails = router_fails
        self.requests: list[Request] = []
        self.targets: list[str | None] = []
        self.assigned: list[dict[str, Any]] = []
        self.dead: list[str] = []
        self.assign = Method(self._assign)
        self.mark_dead = Method(self._mark_dead)
        self.generate = Method(self._generate)

    def options(self, *, stream: bool) -> "Cluster":
        assert stream
        return self

    async def answer(self) -> list[RequestOutput]:
        dispatcher = Dispatcher(cast(Any, self), cast(Any, self), replica_wait_s=5)
        return [o async for o in dispatcher.stream(REQUEST) if isinstance(o, RequestOutput)]

    def _assign(
        self, num_tokens: int, exclude: tuple[str, ...], *, resumed: bool
    ) -> Awaitable[Assignment]:
        async def answer() -> Assignment:
            if self._router_fails is not None:
                raise self._router_fails
            self.assigned.append({"exclude": exclude, "resumed": resumed})
            return Assignment(next(name for name in "abcd" if name not in exclude))

        return answer()

    def _mark_dead(self, replica_id: str) -> Awaitable[None]:
        async def answer() -> None:
            if self._router_fails is not None:
                raise self._router_fails
            self.dead.append(replica_id)

        return answer()

    def _generate(self, request: Request, *, target: str | None) -> Calls:
        self.requests.append(request)
        self.targets.append(target)
        return Calls(request, self._attempts.pop(0))


def unreachable() -> ActorUnavailableError:
    return ActorUnavailableError("connection refused", None)


async def test_a_death_resumes_elsewhere_beyond_the_queue_bound() -> None:
    cluster = Cluster([[Admitted("a"), (7, 8), EngineDied("step")], [Admitted("b"), (9,)]])
    outputs = await cluster.answer()
    assert [o.token_ids for o in outputs] == [(7, 8), (9,)]
    assert cluster.assigned == [
        {"exclude": (), "resumed": False},
        {"exclude": ("a",), "resumed": True},
    ]
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
