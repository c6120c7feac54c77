"""One tensor-parallel rank: a Ray actor that holds a shard and answers rounds on a socket."""

import logging
import os
import pickle
import socket
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from typing import TypeAlias

import ray
import torch
from ray.util import get_node_ip_address

from magicdec.batch import StepResult
from magicdec.cluster.placement import Rendezvous
from magicdec.cluster.preflight import preflight
from magicdec.compute_dtype import compute_dtype
from magicdec.config import EngineConfig
from magicdec.model_loader import describe_model, resolve_checkpoint
from magicdec.profiling.device_rates import RankDevice
from magicdec.profiling.memory_profile import device_memory
from magicdec.runner import ModelRunner

logger = logging.getLogger(__name__)

Channel: TypeAlias = "Connection[bytes, bytes]"
ChannelAddress = str | tuple[str, int]  # a path on the engine's own node, host and port elsewhere


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What one rank learnt by loading."""

    num_affordable_blocks: int
    attention_backend: str
    device: RankDevice
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepReply:
    """A rank's answer to one batch: the result, or what went wrong."""

    result: StepResult | None
    error: str | None


class ShardWorker:
    """Control comes by actor calls, in this order: load, allocate, listen, serve.

    Rounds come by the channel alone: an actor call costs two milliseconds, a socket a twentieth.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._runner: ModelRunner | None = None
        self._listener: Listener | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def choose_master(self) -> tuple[str, int]:
        """An address on this node where the ranks can meet."""
        address = _node_address()
        with socket.create_server((address, 0)) as probe:
            return address, int(probe.getsockname()[1])

    def load(self, rendezvous: Rendezvous) -> ShardFacts:
        """Joins the other ranks and loads this shard; every rank must be called at once.

        Raises UnshardableModel before anything is loaded, and RuntimeError when a rank is missing.
        """
        os.environ.update(rendezvous.environment())
        # Imported only now: DeepSpeed reads that environment, and the engine's process, which
        # names this class, needs no DeepSpeed.
        from magicdec.cluster.tensor_parallel import join_process_group, load_shard

        torch.set_num_threads(self._num_threads())
        folder = resolve_checkpoint(self._config.model.path)
        report = preflight(str(folder), rendezvous.num_ranks)
        join_process_group(rendezvous)
        dtype = self._config.model.dtype
        device = torch.device("cuda" if rendezvous.use_gpu else "cpu")
        module, vocabulary = load_shard(folder, compute_dtype(dtype, device))
        model = describe_model(module, dtype, vocabulary)
        self._runner = ModelRunner(model, self._config, device_memory(device))
        return ShardFacts(
            self._runner.num_affordable_blocks(),
            self._runner.attention_backend,
            self._runner.measure_device(),
            report.warnings,
        )

    def allocate(self, num_blocks: int) -> None:
        """Every rank gets the smallest count: one block table serves them all."""
        self._loaded_runner().allocate_cache(num_blocks)

    def listen(self, engine_node_id: str, authkey: bytes) -> ChannelAddress:
        """Opens the channel; the engine may connect from now on and is served by `serve`."""
        if ray.get_runtime_context().get_node_id() == engine_node_id:
            self._folder = tempfile.TemporaryDirectory(prefix="magicdec-")
            path = os.path.join(self._folder.name, "rank")
            self._listener = Listener(path, family="AF_UNIX", authkey=authkey)
        else:
            self._listener = Listener((_node_address(), 0), authkey=authkey)
        address: ChannelAddress = self._listener.address
        return address

    def serve(self) -> None:
        """Answers rounds until the engine hangs up, or until one fails.

        A failed rank hangs up after it has said why: its KV pages are in an unknown state.
        """
        runner = self._loaded_runner()
        with self._accept() as channel:
            send_at_once(channel)
            while (payload := _receive(channel)) is not None:
                reply = _run(runner, payload)
                channel.send_bytes(pickle.dumps(reply, pickle.HIGHEST_PROTOCOL))
                if reply.error is not None:
                    return

    def _accept(self) -> Channel:
        """The engine's connection. Nothing is left on disk: ranks are killed, not stopped."""
        assert self._listener is not None, "listen comes before serve"
        with self._listener:
            channel = self._listener.accept()
        if self._folder is not None:
            self._folder.cleanup()
        return channel

    def _loaded_runner(self) -> ModelRunner:
        assert self._runner is not None, "load comes first"
        return self._runner

    def _num_threads(self) -> int:
        parallel = self._config.parallel
        if parallel.num_threads is not None:
            return parallel.num_threads
        return max(1, _num_cores() // parallel.tensor_parallel_size)


def _num_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # a container may be given fewer than the host has
    return os.cpu_count() or 1


def _node_address() -> str:
    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def _receive(channel: Channel) -> bytes | None:
    """The next batch, or None when the engine has hung up or died."""
    try:
        return channel.recv_bytes()
    except (EOFError, ConnectionError):
        return None


def _run(runner: ModelRunner, payload: bytes) -> StepReply:
    try:
        return StepReply(runner.execute(pickle.loads(payload)), None)
    except Exception as error:  # the engine must hear of any failure, whatever it is
        logger.exception("the step failed")
        return StepReply(None, f"{type(error).__name__}: {error}")


def send_at_once(channel: Channel) -> None:
    """Over TCP, a batch above 16 KiB goes as two writes: without this the second waits 40 ms."""
    with socket.socket(fileno=os.dup(channel.fileno())) as peer:
        if peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
