"""EngineReplica: one engine as a Serve deployment, its ranks, and its reports to the router."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from magicdec.cluster.metric_table import ENGINE_METRICS
from magicdec.cluster.telemetry import (
    PUBLISH_PERIOD_S,
    EngineTelemetry,
    Recorder,
    common_labels,
)
from magicdec.config import EngineConfig
from magicdec.control.policy_snapshot import PackedPolicy
from magicdec.deployments.autoscaling import replica_stats
from magicdec.deployments.replica_api import Admitted, EngineUnavailable, ReplicaDescription
from magicdec.deployments.replica_report import ReportAnswer, Requests
from magicdec.types import Request, RequestOutput

if TYPE_CHECKING:  # imports torch, which only a running replica needs
    from magicdec.deployments.engine_loop import EngineLoop

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 2.0
EXIT_GRACE_S = 0.5  # for the notices of a fatal error to leave the process


class EngineReplica:
    """Owns an engine and its thread; the event loop here only moves outputs.

    A step that fails ends the process: the ranks' state is unknown, and a fresh replica starts
    sooner than Serve's health check would notice. The ingress resumes the streams elsewhere.
    """

    def __init__(
        self,
        config: EngineConfig,
        router: DeploymentHandle[Any],
        model_name: str,
        drain_file: str | None = None,
    ) -> None:
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        # Here, not at the top: whoever only deploys this class needs no torch.
        from magicdec.deployments.engine_builder import build_engine
        from magicdec.deployments.engine_loop import EngineLoop

        built = build_engine(config)
        self._engine_loop = EngineLoop(built.engine, self._on_fatal)
        self._built = built
        self._num_ranks = config.parallel.tensor_parallel_size
        self._requests = Requests(config.scheduler)
        reports = report_for_ever(
            router,
            self._replica_id,
            self._engine_loop,
            self._requests,
            None if drain_file is None else Path(drain_file),
        )
        telemetry = EngineTelemetry(
            Recorder(ENGINE_METRICS, common_labels(model_name, self._replica_id)),
            built.engine.attention_backend,
            self._num_ranks,
        )
        publishing = publish_for_ever(self._engine_loop, telemetry)
        self._background = {asyncio.create_task(reports), asyncio.create_task(publishing)}

    async def generate(
        self,
        request: Request,
        target: str | None = None,
        prefix_hashes: tuple[int, ...] = (),
    ) -> AsyncIterator[Admitted | RequestOutput]:
        """Admitted, then one RequestOutput a verify round.

        `target` is not used here: the request router read it to choose this replica. Raises
        RequestError, EngineUnavailable or EngineDied.
        """
        if not self._engine_loop.is_alive:
            raise EngineUnavailable("this replica's engine has failed or stopped")
        stream = self._engine_loop.stream(request)
        self._requests.begin(request, prefix_hashes)
        try:
            yield Admitted(self._replica_id)
            async for output in stream:
                self._requests.add(output)
                yield output
        finally:
            self._requests.end(request.request_id)
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook, where it scales: see autoscaling.py."""
        return replica_stats(self._engine_loop.load(), self._requests.num_queued_tokens)

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


async def publish_for_ever(engine_loop: "EngineLoop", telemetry: EngineTelemetry) -> None:
    """Ends with the engine. An idle one is published too: gauges that are not set anew vanish."""
    while engine_loop.is_alive:
        counts = engine_loop.take_counts()
        if counts is not None:
            telemetry.publish(counts)
        await asyncio.sleep(PUBLISH_PERIOD_S)


async def report_for_ever(
    router: DeploymentHandle[Any],
    replica_id: str,
    engine_loop: "EngineLoop",
    requests: Requests,
    drain_file: Path | None = None,
) -> None:
    """Ends with the engine, and not before: a replica that is not heard of gets no requests.

    Where `drain_file` is there, it says that it takes nothing new.
    """
    merged: PackedPolicy | None = None
    while engine_loop.is_alive:
        draining = drain_file is not None and drain_file.exists()
        report = requests.report(engine_loop.load(), draining=draining)
        learnt = engine_loop.take_policy()
        policy = None if learnt is None else PackedPolicy.pack(learnt)
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                answer: ReportAnswer = await router.report.remote(replica_id, report, policy)
        except Exception as error:  # RayError, AioRpcError, Serve's own: the next may get through
            logger.warning("the router did not take a report: %r", error)
        else:
            requests.was_taken(report, answer)
            others = answer.policy
            if others is not None and (merged is None or not others.says_the_same(merged)):
                engine_loop.merge_policy(others.unpack())
                merged = others
        await requests.wait_for_news()
