"""What one replica learns reaches the others through the router: real engines, no Ray."""

import asyncio
import math
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.acceptance.records import AcceptanceSnapshot, CellCount
from magicdec.batch import Plan
from magicdec.control import policy_pool
from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import FixedPolicy
from magicdec.deployments import engine_loop, replica_report
from magicdec.deployments.engine_loop import EngineLoop
from magicdec.deployments.replica import report_for_ever
from magicdec.deployments.replica_report import Requests
from magicdec.deployments.router import Router
from magicdec.routing.settings import AdmissionConfig
from magicdec.types import Request, SamplingParams
from tests.conftest import EngineFactory, engine_config

AXES = AcceptanceAxes(("streaming",), (512,))
CONTEXT = 5000
NOTHING_ACCEPTED = 1.2  # tokens of four drafts, for one that has seen them fail
HOPEFUL = 2.0  # and for one that has seen nothing

Start = Callable[[str, "LearningPolicy"], EngineLoop]


class LearningPolicy(FixedPolicy):
    """Plans are fixed; what is known of drafts is a real model's."""

    def __init__(self, num_failed: int = 0) -> None:
        super().__init__(Plan("streaming", 2, 24))
        self.model = AcceptanceModel(AXES)
        for _ in range(num_failed):
            self.model.observe("streaming", 512, CONTEXT, 4, 0)
        self.merged: list[PolicySnapshot] = []
        self.expected_at_steps: list[float] = []

    def choose(self, load: RoundLoad) -> Plan:
        self.expected_at_steps.append(self.expected_tokens)
        return super().choose(load)

    @property
    def expected_tokens(self) -> float:
        return self.model.expected_tokens("streaming", 512, CONTEXT, 4)

    def snapshot(self) -> PolicySnapshot | None:
        return PolicySnapshot(self.model.snapshot(), {"verify": 1.5})

    def merge(self, others: PolicySnapshot) -> None:
        self.model.merge(others.acceptance)
        self.merged.append(others)


class AbsurdPolicy(LearningPolicy):
    def snapshot(self) -> PolicySnapshot | None:
        cell = CellCount("streaming", 512, 5, 1, 1e5, math.nan)
        return PolicySnapshot(AcceptanceSnapshot((cell,)), {"verify": math.inf})


class Handle:
    """The router, or None while it is away; what passes is pickled as between processes."""

    def __init__(self) -> None:
        self.router: Router | None = Router(AdmissionConfig())
        self.report = self

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        async def call() -> Any:
            if self.router is None:
                raise RuntimeError("the router is away")
            sent = pickle.loads(pickle.dumps(arguments))
            return pickle.loads(pickle.dumps(await self.router.report(*sent)))

        return call()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_pool, "_SETTLE_S", 0.0)
    monkeypatch.setattr(engine_loop, "POLICY_PERIOD_S", 0.02)
    monkeypatch.setattr(replica_report, "REPORT_PERIOD_S", 0.04)
    monkeypatch.setattr(replica_report, "LEAST_REPORT_PERIOD_S", 0.01)


@pytest.fixture
def handle() -> Handle:
    return Handle()


@pytest.fixture
async def start(
    make_engine: EngineFactory, tiny_model_dir: Path, handle: Handle
) -> AsyncIterator[Start]:
    """Starts a replica: an engine with that policy, its thread, its reports."""
    config = engine_config(tiny_model_dir, draft_length=2)
    loops: list[EngineLoop] = []
    tasks: list[asyncio.Task[None]] = []

    def fail(error: BaseException) -> None:
        raise AssertionError("unexpected") from error

    def begin(name: str, policy: LearningPolicy) -> EngineLoop:
        engine = make_engine(config)
        engine.policy = policy
        loops.append(EngineLoop(engine, fail))
        requests = Requests(config.scheduler)
        reports = report_for_ever(cast(Any, handle), name, loops[-1], requests)
        tasks.append(asyncio.create_task(reports))
        return loops[-1]

    yield begin
    for loop in loops:
        loop.stop()
    await asyncio.gather(*tasks)


@asynccontextmanager
async def soon() -> AsyncIterator[None]:
    async with asyncio.timeout(10):
        yield


async def until(holds: Callable[[], bool]) -> None:
    async with soon():
        while not holds():
            await asyncio.sleep(0.005)


async def answer(loop: EngineLoop) -> int:
    """Tokens of one request's answer."""
    request = Request("r", (5, 6, 7), SamplingParams(max_tokens=20, ignore_eos=True))
    async with soon():
        return sum([len(output.token_ids) async for output in loop.stream(request)])


async def test_what_one_replica_saw_reaches_the_other(start: Start) -> None:
    veteran, other = LearningPolicy(100), LearningPolicy()
    assert other.expected_tokens > HOPEFUL
    loops = [start("a", veteran), start("b", other)]
    await until(lambda: other.expected_tokens < NOTHING_ACCEPTED)
    # The other has seen nothing itself, and does not hand on what it was told.
    assert not any(others.acceptance.cells for others in veteran.merged)
    assert dict(other.merged[-1].cost_factors) == {"verify": 1.5}
    assert [await answer(loop) for loop in loops] == [20, 20]


async def test_a_replica_goes_on_learning_from_another(start: Start) -> None:
    veteran, other = LearningPolicy(10), LearningPolicy()
    start("a", veteran)
    start("b", other)
    await until(lambda: len(other.merged) > 0)
    first = other.merged[-1].acceptance.cells[0].examined
    veteran.model.observe("streaming", 512, CONTEXT, 4, 0)
    await until(lambda: other.merged[-1].acceptance.cells[0].examined == first + 1)


async def test_what_is_known_already_is_not_merged_again(start: Start) -> None:
    other = LearningPolicy()
    start("a", LearningPolicy(10))
    start("b", other)
    await until(lambda: len(other.merged) > 0)
    await asyncio.sleep(0.3)  # of many reports
    assert len(other.merged) == 1


async def test_a_new_replica_knows_what_the_cluster_does_before_its_first_request(
    start: Start, handle: Handle
) -> None:
    seen = LearningPolicy()
    start("a", LearningPolicy(100))
    start("b", seen)
    await until(lambda: len(seen.merged) > 0)  # so the pool has it
    newcomer = LearningPolicy()
    loop = start("c", newcomer)
    router = handle.router
    assert router is not None
    async with soon():
        while "c" not in await router.live_replicas():  # before that nobody sends it anything
            await asyncio.sleep(0)
    await asyncio.sleep(0)  # the answer to its report is quicker than a request by the ingress
    assert await answer(loop) == 20
    assert newcomer.expected_at_steps[0] < NOTHING_ACCEPTED


async def test_engines_go_on_with_the_last_policy_while_the_router_is_away(
    start: Start, handle: Handle
) -> None:
    other = LearningPolicy()
    loops = [start("a", LearningPolicy(100)), start("b", other)]
    await until(lambda: len(other.merged) > 0)
    handle.router = None
    await asyncio.sleep(0.2)
    assert other.expected_tokens < NOTHING_ACCEPTED and len(other.merged) == 1
    assert [await answer(loop) for loop in loops] == [20, 20]


async def test_the_next_router_has_the_pool_from_the_next_reports(
    start: Start, handle: Handle
) -> None:
    other = LearningPolicy()
    start("a", LearningPolicy(100))
    start("b", other)
    await until(lambda: len(other.merged) > 0)
    handle.router = None
    await asyncio.sleep(0.1)
    handle.router = Router(AdmissionConfig())
    newcomer = LearningPolicy()
    start("c", newcomer)
    await until(lambda: newcomer.expected_tokens < NOTHING_ACCEPTED)
    assert other.expected_tokens < NOTHING_ACCEPTED


async def test_absurd_statistics_are_dropped_and_the_load_is_not(
    start: Start, handle: Handle
) -> None:
    router, other = handle.router, LearningPolicy()
    assert router is not None
    start("absurd", AbsurdPolicy())
    start("b", other)
    async with soon():
        while (await router.stats()).num_dropped_policies < 3:
            await asyncio.sleep(0.005)
    assert await router.live_replicas() == ["absurd", "b"]
    assert (await router.stats()).num_dropped_reports == 0
    assert other.merged == [] and other.expected_tokens > HOPEFUL
