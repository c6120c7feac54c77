"""EngineReplica: one engine as a Serve deployment, its ranks, and its reports to the router."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from magicdec.config import EngineConfig
from magicdec.deployments.replica_api import Admitted, EngineUnavailable, ReplicaDescription
from magicdec.types import Request, RequestOutput

if TYPE_CHECKING:  # imports torch, which only a running replica needs
    from magicdec.deployments.engine_loop import EngineLoop

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 0.5
REPORT_TIMEOUT_S = 2.0
EXIT_GRACE_S = 0.5  # for the notices of a fatal error to leave the process


class EngineReplica:
    """Owns an engine and its thread; the event loop here only moves outputs.

    A step that fails ends the process: the ranks' state is unknown, and a fresh replica starts
    sooner than Serve's health check would notice. The ingress resumes the streams elsewhere.
    """

    def __init__(self, config: EngineConfig, router: DeploymentHandle[Any]) -> None:
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        # Here, not at the top: whoever only deploys this class needs no torch.
        from magicdec.deployments.engine_builder import build_engine
        from magicdec.deployments.engine_loop import EngineLoop

        built = build_engine(config)
        self._engine_loop = EngineLoop(built.engine, self._on_fatal)
        self._built = built
        self._num_ranks = config.parallel.tensor_parallel_size
        reports = report_for_ever(router, self._replica_id, self._engine_loop)
        self._background = {asyncio.create_task(reports)}

    async def generate(
        self, request: Request, target: str | None = None
    ) -> AsyncIterator[Admitted | RequestOutput]:
        """Admitted, then one RequestOutput a verify round.

        `target` is not used here: the request router read it to choose this replica. Raises
        RequestError, EngineUnavailable or EngineDied.
        """
        if not self._engine_loop.is_alive:
            raise EngineUnavailable("this replica's engine has failed or stopped")
        yield Admitted(self._replica_id)
        stream = self._engine_loop.stream(request)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def describe(self) -> ReplicaDescription:
        load = self._engine_loop.load()
        return ReplicaDescription(
            replica_id=self._replica_id,
            pid=os.getpid(),
            attention_backend=self._built.engine.attention_backend,
            num_ranks=self._num_ranks,
            kv_capacity_tokens=load.total_kv_tokens,
            max_model_len=self._built.engine.max_model_len,
            vocab_size=self._built.vocab_size,
            load=load,
        )

    async def check_health(self) -> None:
        """Runs on the event loop, so a long step does not look like a dead replica."""
        if not self._engine_loop.is_alive:
            raise EngineUnavailable("this replica's engine has failed or stopped")

    def __del__(self) -> None:
        """Serve's hook at the end of a drain."""
        self._engine_loop.stop()

    def _on_fatal(self, error: BaseException) -> None:
        logger.critical("fatal engine error, this replica exits: %r", error)
        self._background.add(asyncio.create_task(self._exit_soon()))

    async def _exit_soon(self) -> None:
        """A fresh process is the only safe state; the pause lets every stream's error leave."""
        await asyncio.sleep(EXIT_GRACE_S)
        os._exit(1)


async def report_for_ever(
    router: DeploymentHandle[Any], replica_id: str, engine_loop: "EngineLoop"
) -> None:
    """Ends with the engine, and not before: a replica that is not heard of gets no requests."""
    while engine_loop.is_alive:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                await router.report.remote(replica_id, engine_loop.load())
        except Exception as error:  # RayError, AioRpcError, Serve's own: the next may get through
            logger.warning("the router did not take a load report: %r", error)
        await asyncio.sleep(REPORT_PERIOD_S)
