"""Sends requests to replicas and, when a replica is lost, resumes them on another."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, cast

from grpc.aio import AioRpcError  # type: ignore[import-untyped]
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from magicdec.deployments.errors import no_replica, overloaded
from magicdec.deployments.journal import Journal, ReplicaLost
from magicdec.deployments.replica_api import Admitted, EngineDied, EngineUnavailable
from magicdec.routing.prefix_affinity import prefix_hashes
from magicdec.routing.settings import Ask, Assignment
from magicdec.types import Request, RequestOutput

logger = logging.getLogger(__name__)

ROUTER_TIMEOUT_S = 1.0  # beyond the time that it was given
FIRST_WAIT_S = 0.5  # for the Router's choice; then it is known to be there
NEXT_WAIT_S = 2.0
ROUTER_RESTART_S = 15.0  # a request that waited asks so long for a Router that is gone
RETRY_PERIOD_S = 0.25

# Over gRPC, Serve cannot tell a dead replica from an unreachable one: both count as deaths, since
# the request may be what killed it. Until a replica accepts a call, Serve itself tries others.
DEATHS = (ActorDiedError, ActorUnavailableError, EngineDied)
# The call went away, the replica may live on.
LOSSES = (AioRpcError, RayServeException, EngineUnavailable)

Item = Admitted | RequestOutput
Calls = DeploymentResponseGenerator[Any]


@dataclass(slots=True)
class _Attempts:
    """One request's way to a replica: what every Ask of it has in common."""

    journal: Journal
    prefix_hashes: tuple[int, ...]
    since: float
    refused_by: tuple[str, ...] = ()

    def ask(self, request: Request, client: str) -> Ask:
        journal, num_emitted = self.journal, len(request.emitted_token_ids)
        return Ask(
            request_id=request.request_id,
            num_context_tokens=len(request.prompt_token_ids) + num_emitted,
            max_tokens=max(request.sampling.max_tokens - num_emitted, 1),
            key=client,
            prefix_hashes=self.prefix_hashes,
            exclude=(*journal.lost, *self.refused_by),
            resumed=journal.resumes > 0,
        )


class Dispatcher:
    """Serves the requests of one HTTP request. `client`: whose it is, for fairness.
    `replica_wait_s`: how long each may wait for a replica to answer once one was chosen (all are
    starting, say); the wait in the Router's queue is not in it."""

    def __init__(
        self,
        router: DeploymentHandle[Any],
        replicas: DeploymentHandle[Any],
        client: str,
        *,
        replica_wait_s: float,
    ) -> None:
        self._router = router
        self._client = client
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
        hashes = await asyncio.to_thread(prefix_hashes, request.prompt_token_ids)
        finished = False
        while not finished:
            attempts = _Attempts(journal, hashes, time.monotonic())
            try:
                async for item in self._on_one_replica(attempts):
                    if isinstance(item, RequestOutput):
                        finished = item.finish_reason is not None
                        item = journal.add(item)
                    yield item
            except ReplicaLost as loss:
                logger.warning("request %s: %s", request.request_id, loss)
                await self._report_dead(loss)
                journal.replica_lost(loss)

    async def _on_one_replica(self, attempts: _Attempts) -> AsyncIterator[Item]:
        """What one replica adds to the answer. Raises ReplicaLost."""
        admitted, calls = await self._admit(attempts)
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

    async def _admit(self, attempts: _Attempts) -> tuple[Admitted, Calls]:
        """Asks until a replica has taken the request. Raises ApiError, ReplicaLost.

        A replica whose engine has failed refuses without having run the request: that is not a
        death with the request live in it, so the next one is asked.
        """
        remaining = self._replica_wait_s
        while remaining > 0:
            request = attempts.journal.next_request()
            target = await self._choose(attempts.ask(request, self._client), attempts.since)
            chosen_at = time.monotonic()
            try:
                async with self._routing, asyncio.timeout(remaining):
                    return await self._call(request, target, attempts.prefix_hashes)
            except TimeoutError:
                break
            except DEATHS as error:
                # Nobody said that the request arrived, nor where: nobody is blamed for its loss.
                attempts.journal.avoid(target)
                raise ReplicaLost(None, died=False) from error
            except LOSSES:
                attempts.refused_by += (target,) if target else ()
                await asyncio.sleep(RETRY_PERIOD_S)
            remaining -= time.monotonic() - chosen_at
        raise no_replica(self._replica_wait_s)

    async def _call(
        self, request: Request, target: str | None, hashes: tuple[int, ...]
    ) -> tuple[Admitted, Calls]:
        """Starts one call; its first item says which replica took it."""
        calls = cast(
            Calls, self._replicas.generate.remote(request, target=target, prefix_hashes=hashes)
        )
        try:
            return await anext(calls), calls
        except BaseException:
            _cancel(calls)
            raise

    async def _choose(self, ask: Ask, since: float) -> str | None:
        """The Router's choice, or None to let Serve choose. Raises ApiError (429).

        Asks for as long as the request has to wait. Where the Router is away a new request goes
        where Serve sends it; one that was waiting for room asks the Router that comes next, or all
        that wait would fall upon the replicas at once.
        """
        waits, answered_at = False, time.monotonic()
        while True:
            try:
                assignment = await self._ask(ask, since, NEXT_WAIT_S if waits else FIRST_WAIT_S)
            except Exception as error:  # RayError, AioRpcError, Serve's own: a request outlives any
                if waits and time.monotonic() - answered_at < ROUTER_RESTART_S:
                    await asyncio.sleep(RETRY_PERIOD_S)
                    continue
                logger.warning("the router does not answer, Serve chooses the replica: %r", error)
                return None
            if assignment is None:
                waits, answered_at = True, time.monotonic()
                continue
            if assignment.retry_after_s is not None:
                raise overloaded(assignment.retry_after_s)
            if assignment.replica_id is None:
                logger.info("the router knows no other live replica, Serve chooses")
            return assignment.replica_id

    async def _ask(self, ask: Ask, since: float, wait_s: float) -> Assignment | None:
        waited_s = time.monotonic() - since
        try:
            async with asyncio.timeout(wait_s + ROUTER_TIMEOUT_S):
                call = self._router.assign.remote(replace(ask, waited_s=waited_s), wait_s)
                return cast(Assignment | None, await call)
        except asyncio.CancelledError:  # the client has left: nobody waits for the answer to this
            self._router.cancel.remote(ask.request_id)
            raise

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
