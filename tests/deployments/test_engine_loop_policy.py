"""The engine's thread and what its policy learns: asked now and then, told what others know."""

import asyncio
from pathlib import Path

import pytest

from magicdec.acceptance.records import AcceptanceSnapshot
from magicdec.batch import Plan
from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import FixedPolicy
from magicdec.deployments import engine_loop
from magicdec.deployments.engine_loop import EngineLoop
from magicdec.executor import LocalExecutor
from tests.conftest import EngineFactory, engine_config
from tests.deployments.executors import HeldExecutor, collect, engine_over, ignore, request


class LearningPolicy(FixedPolicy):
    """Its snapshots are numbered by `num_dropped`."""

    def __init__(self) -> None:
        super().__init__(Plan("streaming", 0, 24))
        self.num_asked = 0
        self.told: list[PolicySnapshot | int] = []  # what was merged, and the loads of rounds

    def choose(self, load: RoundLoad) -> Plan:
        self.told.append(len(load.context_lens))
        return super().choose(load)

    def snapshot(self) -> PolicySnapshot | None:
        self.num_asked += 1
        return PolicySnapshot(AcceptanceSnapshot(()), {}, self.num_asked)

    def merge(self, others: PolicySnapshot) -> None:
        self.told.append(others)


async def wait_for_policy(loop: EngineLoop) -> PolicySnapshot:
    async with asyncio.timeout(5):
        while (policy := loop.take_policy()) is None:
            await asyncio.sleep(0.002)
    return policy


async def test_what_was_learnt_is_told_once_a_period(
    make_engine: EngineFactory, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "POLICY_PERIOD_S", 0.1)
    engine = make_engine(engine_config(tiny_model_dir))
    engine.policy = policy = LearningPolicy()
    loop = EngineLoop(engine, ignore)
    started = asyncio.get_running_loop().time()
    told = [(await wait_for_policy(loop)).num_dropped for _ in range(3)]  # of an idle engine, too
    assert asyncio.get_running_loop().time() - started >= 0.2
    assert told == [1, 2, 3] and policy.num_asked == 3
    loop.stop()


async def test_a_long_step_is_asked_once(tiny_model_dir: Path) -> None:
    config = engine_config(tiny_model_dir)
    executor = HeldExecutor(LocalExecutor(config))
    engine = engine_over(executor, config)
    engine.policy = policy = LearningPolicy()
    loop = EngineLoop(engine, ignore)
    stream = asyncio.create_task(collect(loop, request("r")))
    await asyncio.to_thread(executor.entered.wait, 10)
    for _ in range(20):
        assert loop.take_policy() is None
    executor.release.set()
    await stream
    assert (await wait_for_policy(loop)).num_dropped == 1 == policy.num_asked
    loop.stop()


async def test_a_fixed_plan_has_nothing_to_tell(
    make_engine: EngineFactory, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "POLICY_PERIOD_S", 0.0)
    loop = EngineLoop(make_engine(engine_config(tiny_model_dir)), ignore)
    for _ in range(20):
        assert loop.take_policy() is None
        await asyncio.sleep(0.002)
    loop.stop()


async def test_what_others_know_is_merged_before_the_requests_that_follow(
    make_engine: EngineFactory, tiny_model_dir: Path
) -> None:
    engine = make_engine(engine_config(tiny_model_dir))
    engine.policy = policy = LearningPolicy()
    loop = EngineLoop(engine, ignore)
    others = PolicySnapshot(AcceptanceSnapshot(()), {"verify": 1.2})
    loop.merge_policy(others)
    await collect(loop, request("r"))
    assert policy.told[0] is others and len(policy.told) > 10
    loop.stop()
