"""The engine's thread, with a real engine and no Ray: streams, cancellation, fatal errors."""

import asyncio
import threading
from pathlib import Path

import pytest

from magicdec.batch import Batch, StepResult
from magicdec.config import EngineConfig
from magicdec.deployments.engine_loop import EngineLoop
from magicdec.deployments.replica_api import EngineDied, EngineUnavailable
from magicdec.engine import Engine
from magicdec.executor import Executor, ExecutorError, LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import FinishReason, Request, RequestError, RequestOutput, SamplingParams
from tests.conftest import EngineFactory, engine_config


class WrappedExecutor:
    """A real executor, for what follows to disturb."""

    def __init__(self, inner: LocalExecutor) -> None:
        self._inner = inner

    @property
    def num_blocks(self) -> int:
        return self._inner.num_blocks

    @property
    def attention_backend(self) -> str:
        return self._inner.attention_backend

    def execute(self, batch: Batch) -> StepResult:
        return self._inner.execute(batch)

    def shutdown(self) -> None:
        self._inner.shutdown()


class FailingExecutor(WrappedExecutor):
    """One whose ranks die at a given step."""

    def __init__(self, inner: LocalExecutor, fails_at: int) -> None:
        super().__init__(inner)
        self._steps_left = fails_at

    def execute(self, batch: Batch) -> StepResult:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ExecutorError("a rank died")
        return super().execute(batch)


class HeldExecutor(WrappedExecutor):
    """One whose steps end only once `release` is set."""

    def __init__(self, inner: LocalExecutor) -> None:
        super().__init__(inner)
        self.entered = threading.Event()
        self.release = threading.Event()

    def execute(self, batch: Batch) -> StepResult:
        self.entered.set()
        self.release.wait(timeout=10)
        return super().execute(batch)


def request(name: str, max_tokens: int = 20, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, prompt, sampling)


def ignore(error: BaseException) -> None:
    """No test that uses it expects a fatal error."""
    raise AssertionError("unexpected") from error


def engine_over(executor: Executor, config: EngineConfig) -> Engine:
    path = config.model.path
    return Engine(config, executor, load_tokenizer(path), read_model_facts(path))


async def collect(loop: EngineLoop, wanted: Request) -> list[RequestOutput]:
    return [output async for output in loop.stream(wanted)]


async def test_streams_run_together(make_engine: EngineFactory, tiny_model_dir: Path) -> None:
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir, draft_length=2)), ignore)
    results = await asyncio.gather(*(collect(loop, request(f"r{i}")) for i in range(5)))
    for outputs in results:
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(output.token_ids) for output in outputs) == 20
    assert len({tuple(t for o in outputs for t in o.token_ids) for outputs in results}) == 1
    assert loop.num_streams == 0
    loop.stop()
    assert not loop.is_alive


async def test_closing_a_stream_aborts_its_request(
    make_engine: EngineFactory, tiny_model_dir: Path
) -> None:
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir)), ignore)
    stream = loop.stream(request("left", max_tokens=400))
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(5):
        while loop.load().free_kv_tokens != loop.load().total_kv_tokens:
            await asyncio.sleep(0.01)
    loop.stop()


async def test_a_refused_request_raises(make_engine: EngineFactory, tiny_model_dir: Path) -> None:
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir)), ignore)
    with pytest.raises(RequestError):
        await collect(loop, request("wrong", prompt=(99999,)))
    assert (await collect(loop, request("right")))[-1].finish_reason is FinishReason.LENGTH
    loop.stop()


async def test_a_fatal_step_fails_every_request(tiny_model_dir: Path) -> None:
    config = engine_config(tiny_model_dir, max_num_seqs=1)
    engine = engine_over(FailingExecutor(LocalExecutor(config), fails_at=3), config)
    fatal: list[BaseException] = []
    loop = EngineLoop(engine, fatal.append)
    # One runs, two are queued: all three must hear of it.
    results = await asyncio.gather(
        *(collect(loop, request(f"r{i}")) for i in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [EngineDied] * 3
    assert [type(error) for error in fatal] == [ExecutorError]
    assert not loop.is_alive
    with pytest.raises(EngineUnavailable):
        await collect(loop, request("late"))


async def test_stop_tells_live_and_waiting_streams(tiny_model_dir: Path) -> None:
    config = engine_config(tiny_model_dir, max_num_seqs=1)
    executor = HeldExecutor(LocalExecutor(config))
    loop = EngineLoop(engine_over(executor, config), ignore)
    streams = [asyncio.create_task(collect(loop, request(f"r{i}", 400))) for i in range(3)]
    await asyncio.to_thread(executor.entered.wait, 10)
    executor.release.set()
    await asyncio.to_thread(loop.stop)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(result) for result in results] == [EngineUnavailable] * 3
    assert loop.num_streams == 0


async def test_requests_that_come_during_a_step_count_as_waiting(tiny_model_dir: Path) -> None:
    config = engine_config(tiny_model_dir)
    executor = HeldExecutor(LocalExecutor(config))
    loop = EngineLoop(engine_over(executor, config), ignore)
    first = asyncio.create_task(collect(loop, request("first")))
    await asyncio.to_thread(executor.entered.wait, 10)
    before = loop.load()
    others = [asyncio.create_task(collect(loop, request(f"r{i}"))) for i in range(2)]
    cancelled = asyncio.create_task(collect(loop, request("gone")))
    await asyncio.sleep(0.01)
    cancelled.cancel()  # its abort is in the inbox too, and is no request
    await asyncio.sleep(0.01)
    assert loop.load().num_waiting - before.num_waiting == 3
    executor.release.set()
    await asyncio.gather(first, *others)
    assert (loop.load().num_running, loop.load().num_waiting) == (0, 0)
    loop.stop()


async def test_a_second_stream_of_a_live_id_leaves_the_first_alone(
    make_engine: EngineFactory, tiny_model_dir: Path
) -> None:
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir)), ignore)
    first = loop.stream(request("same"))
    outputs = [await anext(first)]
    with pytest.raises(RequestError):
        await collect(loop, request("same"))
    async with asyncio.timeout(10):
        outputs += [output async for output in first]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert (await collect(loop, request("same")))[-1].finish_reason is FinishReason.LENGTH
    loop.stop()
