"""Sends requests to replicas and, when a replica is lost, resumes them on another."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from grpc.aio import AioRpcError  # type: ignore[import-untyped]
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from magicdec.admission import Assignment
from magicdec.deployments.errors import no_replica, overloaded
from magicdec.deployments.journal import Journal, ReplicaLost
from magicdec.deployments.replica_api import Admitted, EngineDied, EngineUnavailable
from magicdec.types import Request, RequestOutput

logger = logging.getLogger(__name__)

ROUTER_TIMEOUT_S = 1.0
RETRY_PERIOD_S = 0.25

# Over gRPC, Serve cannot tell a dead replica from an unreachable one: both count as deaths, since
# the request may be what killed it. Until a replica accepts a call, Serve itself tries others.
DEATHS = (ActorDiedError, ActorUnavailableError, EngineDied)
# The call went away, the replica may live on.
LOSSES = (AioRpcError, RayServeException, EngineUnavailable)

Item = Admitted | RequestOutput
Calls = DeploymentResponseGenerator[Any]


class Dispatcher:
    """Serves the requests of one HTTP request. `replica_wait_s`: how long each may wait for a
    replica while none can take it (all are starting, say)."""

    def __init__(
        self,
        router: DeploymentHandle[Any],
        replicas: DeploymentHandle[Any],
        *,
        replica_wait_s: float,
    ) -> None:
        self._router = router
        self._replicas = replicas.options(stream=True)
        self._replica_wait_s = replica_wait_s
        # PinnedRequestRouter says why two calls of one HTTP request are not routed at once.
        self._routing = asyncio.Lock()

    async def stream(self, request: Request) -> AsyncIterator[Item]:
        """The outputs without a gap or a repetition, whatever replicas do.

        Admitted comes first, and again for each replica that takes over. Raises ApiError when the
        request has to end without an answer, RequestError when the engine refuses it.
        """
        journal = Journal(request)
        finished = False
        while not finished:
            try:
                async for item in self._on_one_replica(journal):
                    if isinstance(item, RequestOutput):
                        finished = item.finish_reason is not None
                        item = journal.add(item)
                    yield item
            except ReplicaLost as loss:
                logger.warning("request %s: %s", request.request_id, loss)
                await self._report_dead(loss)
                journal.replica_lost(loss)

    async def _on_one_replica(self, journal: Journal) -> AsyncIterator[Item]:
        """What one replica adds to the answer. Raises ReplicaLost."""
        admitted, calls = await self._admit(journal)
        finished = False
        try:
            yield admitted
            async for item in calls:
                finished = isinstance(item, RequestOutput) and item.finish_reason is not None
                yield item
            if not finished:
                raise ReplicaLost(admitted.replica_id, died=False)
        except DEATHS as error:
            raise ReplicaLost(admitted.replica_id, died=True) from error
        except LOSSES as error:
            raise ReplicaLost(admitted.replica_id, died=False) from error
        finally:
            if not finished:
                _cancel(calls)

    async def _admit(self, journal: Journal) -> tuple[Admitted, Calls]:
        """Asks until a replica has taken the request. Raises ApiError, ReplicaLost.

        A replica whose engine has failed refuses without having run the request: that is not a
        death with the request live in it, so the next one is asked.
        """
        deadline = time.monotonic() + self._replica_wait_s
        refused_by: list[str] = []
        while (remaining := deadline - time.monotonic()) > 0:
            target = await self._choose(journal, refused_by)
            try:
                async with self._routing, asyncio.timeout(remaining):
                    return await self._call(journal.next_request(), target)
            except TimeoutError:
                break
            except DEATHS as error:
                # Nobody said that the request arrived, nor where: nobody is blamed for its loss.
                journal.avoid(target)
                raise ReplicaLost(None, died=False) from error
            except LOSSES:
                refused_by.extend([target] if target else [])
                await asyncio.sleep(RETRY_PERIOD_S)
        raise no_replica(self._replica_wait_s)

    async def _call(self, request: Request, target: str | None) -> tuple[Admitted, Calls]:
        """Starts one call; its first item says which replica took it."""
        calls = cast(Calls, self._replicas.generate.remote(request, target=target))
        try:
            return await anext(calls), calls
        except BaseException:
            _cancel(calls)
            raise

    async def _choose(self, journal: Journal, refused_by: list[str]) -> str | None:
        """The Router's choice, or None to let Serve choose. Raises ApiError (429)."""
        exclude = (*journal.lost, *refused_by)
        try:
            async with asyncio.timeout(ROUTER_TIMEOUT_S):
                assignment: Assignment = await self._router.assign.remote(
                    journal.num_tokens(), exclude, resumed=journal.resumes > 0
                )
        except Exception as error:  # RayError, AioRpcError, Serve's own: a request outlives any
            logger.warning("the router does not answer, Serve chooses the replica: %r", error)
            return None
        if assignment.retry_after_s is not None:
            raise overloaded(assignment.retry_after_s)
        if assignment.replica_id is None:
            logger.info("the router knows no other live replica, Serve chooses")
        return assignment.replica_id

    async def _report_dead(self, loss: ReplicaLost) -> None:
        if loss.replica_id is None:
            return
        try:
            async with asyncio.timeout(ROUTER_TIMEOUT_S):
                await self._router.mark_dead.remote(loss.replica_id)
        except Exception as error:  # as in _choose: the stream goes on without the Router
            logger.warning("the router did not hear of a lost replica: %r", error)


def _cancel(calls: Calls) -> None:
    """Tells the replica, which aborts the request; nothing happens where the call has ended."""
    calls.cancel()  # type: ignore[no-untyped-call]
