"""The engine's thread, with a real engine and no Ray: streams, cancellation, fatal errors."""

import asyncio
from pathlib import Path

import pytest

from magicdec.batch import Batch, StepResult
from magicdec.deployments.engine_loop import EngineLoop
from magicdec.deployments.replica_api import EngineDied, EngineUnavailable
from magicdec.engine import Engine
from magicdec.executor import ExecutorError, LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import FinishReason, Request, RequestError, RequestOutput, SamplingParams
from tests.conftest import EngineFactory, engine_config


class FailingExecutor:
    """A real executor whose ranks die at a given step."""

    def __init__(self, inner: LocalExecutor, fails_at: int) -> None:
        self._inner = inner
        self._steps_left = fails_at

    @property
    def num_blocks(self) -> int:
        return self._inner.num_blocks

    def execute(self, batch: Batch) -> StepResult:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ExecutorError("a rank died")
        return self._inner.execute(batch)

    def shutdown(self) -> None:
        self._inner.shutdown()


def request(name: str, max_tokens: int = 20, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, prompt, sampling)


def ignore(error: BaseException) -> None:
    """No test that uses it expects a fatal error."""
    raise AssertionError("unexpected") from error


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
    path = config.model.path
    executor = FailingExecutor(LocalExecutor(config), fails_at=3)
    engine = Engine(config, executor, load_tokenizer(path), read_model_facts(path))
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
