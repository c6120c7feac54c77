"""The engine's thread, with a real engine and no Ray: streams, cancellation, fatal errors."""

import asyncio
from pathlib import Path

import pytest

from magicdec.deployments.engine_loop import EngineLoop
from magicdec.deployments.replica_api import EngineDied, EngineUnavailable
from magicdec.executor import ExecutorError, LocalExecutor
from magicdec.stats import EngineLoad
from magicdec.types import FinishReason, RequestError
from tests.conftest import EngineFactory, engine_config
from tests.deployments.executors import (
    FailingExecutor,
    HeldExecutor,
    collect,
    engine_over,
    ignore,
    request,
)


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
    assert loop.load().num_waiting_tokens - before.num_waiting_tokens == 9
    assert loop.load().num_prefill_tokens - before.num_prefill_tokens == 9
    executor.release.set()
    await asyncio.gather(first, *others)
    assert loop.load() == EngineLoad(0, 0, before.total_kv_tokens, before.total_kv_tokens)
    loop.stop()


async def test_prompts_that_wait_for_a_place_count_in_tokens(
    make_engine: EngineFactory, tiny_model_dir: Path
) -> None:
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir, max_num_seqs=1)), ignore)
    first = loop.stream(request("first", max_tokens=400))
    await anext(first)
    waiting = [
        asyncio.create_task(collect(loop, request(f"r{n}", prompt=(5,) * n))) for n in (10, 20)
    ]
    async with asyncio.timeout(5):
        while loop.load().num_waiting < 2:
            await asyncio.sleep(0)
    load = loop.load()
    assert (load.num_running, load.num_waiting) == (1, 2)
    assert (load.num_waiting_tokens, load.num_prefill_tokens) == (30, 30)
    await first.aclose()
    await asyncio.gather(*waiting)
    assert (loop.load().num_waiting_tokens, loop.load().num_prefill_tokens) == (0, 0)
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
