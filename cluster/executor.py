"""The executor of a sharded model: rank actors in the replica's placement group.

    engine ---- pickled batch ----> rank 0, rank 1, ...     one socket a rank
           <--- StepReply ---------                         all equal, or the step fails

Every rank runs the same batch, so its state is the batch and its own KV pages.
"""

import logging
import pickle
import secrets
import time
from dataclasses import replace
from multiprocessing.connection import Client, Connection, wait
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from magicdec.attention import UnsupportedModel
from magicdec.batch import Batch, StepResult
from magicdec.cluster.placement import Rendezvous, rank_resources
from magicdec.cluster.shard_worker import (
    Channel,
    ShardFacts,
    ShardWorker,
    StepReply,
    send_at_once,
)
from magicdec.config import ConfigError, EngineConfig
from magicdec.executor import ExecutorError
from magicdec.profiling.device_rates import RankDevice

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 120.0  # for a process and its imports; loading has no limit
LIVENESS_PERIOD_SECONDS = 1.0
STEP_TIMEOUT_SECONDS = 600.0  # a step this long is a hang: the longest chunk takes seconds


class ShardedExecutor:
    """Implements magicdec.executor.Executor. Not thread-safe: the engine's one thread owns it.

    A rank that dies closes its socket, which is how the engine learns of it; a slow step is not a
    death, so `step_timeout_seconds` is generous. After a failure the ranks are gone and every call
    raises ExecutorError.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement_group: PlacementGroup | None = None,
        *,
        step_timeout_seconds: float = STEP_TIMEOUT_SECONDS,
    ) -> None:
        """Starts the ranks and waits until they serve.

        Rank i takes bundle i + 1 of the group (see placement.replica_bundles); without a group the
        ranks run on CPUs, wherever Ray puts them. Raises UnsupportedModel or ConfigError for a
        model that does not fit, and ExecutorError when a rank fails to start.
        """
        self._step_timeout_seconds = step_timeout_seconds
        self._failure: str | None = None
        self._channels: list[Channel] = []
        self._workers: list[Any] = []
        self._serving: list[ray.ObjectRef[None]] = []
        try:
            self._facts: ShardFacts = self._start(config, placement_group)
        except RayTaskError as error:
            self.shutdown()
            if isinstance(error.cause, UnsupportedModel | ConfigError):
                raise error.cause from None
            raise ExecutorError(f"a rank failed to start: {error.cause}") from error
        except (RayError, OSError, EOFError) as error:
            self.shutdown()
            raise ExecutorError(f"a rank failed to start: {error}") from error

    @property
    def num_blocks(self) -> int:
        return self._facts.num_affordable_blocks

    @property
    def attention_backend(self) -> str:
        return self._facts.attention_backend

    def measure_device(self) -> RankDevice:
        """As the ranks measured it when they had loaded, all at once."""
        return self._facts.device

    def execute(self, batch: Batch) -> StepResult:
        """Raises ExecutorError when a rank died, failed, hung, or disagrees with rank 0."""
        if self._failure is not None:
            raise ExecutorError(self._failure)
        # Cleared when all replies are in: whoever interrupts us leaves some behind in the sockets.
        self._failure = "an earlier step was interrupted"
        payload = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        for rank, channel in enumerate(self._channels):
            try:
                channel.send_bytes(payload)
            except OSError:
                self._fail(f"rank {rank} died before the step: {self._why_ended(rank)}")
        results = self._collect()
        for rank, result in enumerate(results):
            if result.sequences != results[0].sequences:
                self._fail(f"rank {rank} and rank 0 sampled different tokens")
        self._failure = None
        return results[0]

    def shutdown(self) -> None:
        """Ends the ranks; a second call does nothing."""
        self._failure = self._failure or "the executor was shut down"
        for channel in self._channels:
            channel.close()
        for worker in self._workers:
            ray.kill(worker)
        self._channels, self._workers, self._serving = [], [], []

    def _start(self, config: EngineConfig, placement_group: PlacementGroup | None) -> ShardFacts:
        """What rank 0 says of itself, with the smallest pool of all ranks."""
        num_ranks = config.parallel.tensor_parallel_size
        use_gpu = placement_group is not None and "GPU" in placement_group.bundle_specs[1]
        self._workers = [
            _start_worker(config, placement_group, rank, use_gpu) for rank in range(num_ranks)
        ]
        masters = _gather([w.choose_master.remote() for w in self._workers], START_TIMEOUT_SECONDS)
        address, port = masters[0]
        meeting = Rendezvous(0, num_ranks, address, port, use_gpu)
        facts = _gather(
            [w.load.remote(replace(meeting, rank=r)) for r, w in enumerate(self._workers)]
        )
        for warning in facts[0].warnings:
            logger.warning("%s: %s", config.model.path, warning)
        num_blocks = min(fact.num_affordable_blocks for fact in facts)
        _gather([worker.allocate.remote(num_blocks) for worker in self._workers])
        self._connect()
        device = min((fact.device for fact in facts), key=lambda d: d.rates.bandwidth)
        smallest: ShardFacts = replace(facts[0], num_affordable_blocks=num_blocks, device=device)
        return smallest

    def _connect(self) -> None:
        authkey = secrets.token_bytes(32)
        node_id = ray.get_runtime_context().get_node_id()
        addresses = _gather([w.listen.remote(node_id, authkey) for w in self._workers])
        self._serving = [worker.serve.remote() for worker in self._workers]
        for address in addresses:
            channel: Channel = Client(address, authkey=authkey)
            send_at_once(channel)
            self._channels.append(channel)

    def _collect(self) -> list[StepResult]:
        """One result a rank, in rank order."""
        results: dict[int, StepResult] = {}
        waiting = {channel: rank for rank, channel in enumerate(self._channels)}
        deadline = time.monotonic() + self._step_timeout_seconds
        while waiting:
            ready = wait(list(waiting), timeout=LIVENESS_PERIOD_SECONDS)
            for channel in ready:
                assert isinstance(channel, Connection)
                rank = waiting.pop(channel)
                results[rank] = self._receive(rank, channel)
            if not ready:
                self._check_alive(sorted(waiting.values()), deadline)
        return [results[rank] for rank in range(len(self._channels))]

    def _receive(self, rank: int, channel: Channel) -> StepResult:
        try:
            reply: StepReply = pickle.loads(channel.recv_bytes())
        except (EOFError, OSError):
            self._fail(f"rank {rank} died during the step: {self._why_ended(rank)}")
        if reply.result is None:
            self._fail(f"rank {rank} failed: {reply.error}")
        return reply.result

    def _check_alive(self, waiting: list[int], deadline: float) -> None:
        """A node that vanishes closes no socket; then Ray's word on its actors is the sign."""
        ended, _ = ray.wait(self._serving, num_returns=len(self._serving), timeout=0)
        if ended:
            rank = self._serving.index(ended[0])
            self._fail(f"rank {rank} ended during the step: {self._why_ended(rank)}")
        if time.monotonic() > deadline:
            self._fail(f"ranks {waiting} gave no answer in {self._step_timeout_seconds:.0f} s")

    def _why_ended(self, rank: int) -> str:
        """What Ray knows of a rank that hung up: its exception, or how its process ended."""
        ended, _ = ray.wait([self._serving[rank]], timeout=LIVENESS_PERIOD_SECONDS)
        try:
            ray.get(ended)
        except RayTaskError as error:
            return repr(error.cause)
        except RayError as error:
            return " ".join(str(error).split())
        return "it hung up" if ended else "no reason is known yet"

    def _fail(self, reason: str) -> NoReturn:
        self._failure = reason
        self.shutdown()
        raise ExecutorError(reason)


def _start_worker(
    config: EngineConfig, placement_group: PlacementGroup | None, rank: int, use_gpu: bool
) -> Any:
    resources = rank_resources(use_gpu=use_gpu)
    strategy = (
        PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=rank + 1)
        if placement_group is not None
        else "DEFAULT"
    )
    actor = ray.remote(ShardWorker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0.0),
        scheduling_strategy=strategy,
    )
    return actor.remote(config)


def _gather(refs: list[Any], timeout_seconds: float | None = None) -> list[Any]:
    """The results in order; raises the first failure at once, while other ranks still wait.

    Raises GetTimeoutError (a RayError) when nothing comes for `timeout_seconds`.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=timeout_seconds)
        if not done:
            raise GetTimeoutError(f"no answer in {timeout_seconds} s: are its resources free?")
        ray.get(done)
    results: list[Any] = ray.get(refs)
    return results
