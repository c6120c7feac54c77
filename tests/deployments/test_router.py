"""The Router actor without Ray: who is told what, and when."""

import asyncio
from typing import Any

import pytest

from magicdec.control import policy_pool
from magicdec.deployments.router import Router
from magicdec.routing.settings import AdmissionConfig, Ask
from tests.magicdec.control.policies import FLAWS, counts, packed
from tests.magicdec.routing.replicas import report

WAIT_S = 5.0


def ask(name: str, context: int = 300, *, resumed: bool = False) -> Ask:
    return Ask(name, context, 50, resumed=resumed)


async def test_an_idle_replica_is_assigned_at_once() -> None:
    router = Router(AdmissionConfig())
    assert not (await router.report("a", report())).knew
    answer = await router.assign(ask("r"), WAIT_S)
    assert answer is not None and answer.replica_id == "a"
    assert await router.live_replicas() == ["a"]


async def test_a_report_frees_who_waits() -> None:
    router = Router(AdmissionConfig())
    await router.report("a", report(free=0, running=1))
    waiting = asyncio.create_task(router.assign(ask("r"), WAIT_S))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert (await router.report("a", report(number=1))).knew
    answer = await waiting
    assert answer is not None and answer.replica_id == "a"


async def test_company_is_released_by_the_clock_alone() -> None:
    router = Router(AdmissionConfig(company_wait_s=0.05))
    await router.report("a", report(running=1, free=900))
    loop = asyncio.get_running_loop()
    start = loop.time()
    answers = await asyncio.gather(*(router.assign(ask(f"r{i}", 100), WAIT_S) for i in range(3)))
    assert {answer.replica_id for answer in answers if answer} == {"a"}
    assert 0.04 < loop.time() - start < 1.0


async def test_who_has_waited_long_enough_is_told_so_and_asks_again() -> None:
    router = Router(AdmissionConfig())
    await router.report("a", report(free=0, running=1))
    assert await router.assign(ask("r"), 0.02) is None
    assert (await router.stats()).num_queued == 1
    again = asyncio.create_task(router.assign(ask("r"), WAIT_S))
    await asyncio.sleep(0.01)
    assert (await router.stats()).num_queued == 1
    await router.report("a", report(number=1))
    answer = await again
    assert answer is not None and answer.replica_id == "a"


async def test_an_answer_between_two_asks_is_not_lost() -> None:
    router = Router(AdmissionConfig())
    await router.report("a", report(free=0, running=1))
    assert await router.assign(ask("r"), 0.01) is None
    await router.report("a", report(number=1))
    answer = await router.assign(ask("r"), 0.01)
    assert answer is not None and answer.replica_id == "a"


async def test_two_calls_for_one_request_are_answered_once_each() -> None:
    router = Router(AdmissionConfig())
    await router.report("a", report(free=0, running=1))
    first = asyncio.create_task(router.assign(ask("r"), WAIT_S))
    await asyncio.sleep(0)
    second = asyncio.create_task(router.assign(ask("r"), WAIT_S))
    assert await first is None
    await router.report("a", report(number=1))
    answer = await second
    assert answer is not None and answer.replica_id == "a"


async def test_a_full_queue_is_told_at_once() -> None:
    router = Router(AdmissionConfig(max_queued_requests=1))
    await router.report("a", report(free=0, running=1))
    first = asyncio.create_task(router.assign(ask("r1"), WAIT_S))
    await asyncio.sleep(0)
    refusal = await router.assign(ask("r2"), WAIT_S)
    assert refusal is not None and refusal.retry_after_s == 5.0
    await router.cancel("r1")
    assert (await router.stats()).num_queued == 0
    first.cancel()


async def test_a_lost_replica_s_requests_find_another() -> None:
    router = Router(AdmissionConfig())
    for name in ("a", "b"):
        await router.report(name, report(running=name == "b", free=900))
    answer = await router.assign(ask("r#1"), WAIT_S)
    assert answer is not None and answer.replica_id == "a"
    await router.mark_dead("a")
    again = await router.assign(ask("r#2", resumed=True), WAIT_S)
    assert again is not None and again.replica_id == "b"


async def test_a_router_that_knows_nobody_leaves_it_to_the_cluster() -> None:
    router = Router(AdmissionConfig(blind_wait_s=0.1))
    answer = await router.assign(ask("r"), WAIT_S)
    assert answer is not None and (answer.replica_id, answer.retry_after_s) == (None, None)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Router:
    """One that has heard of everybody."""
    monkeypatch.setattr(policy_pool, "_SETTLE_S", 0.0)
    return Router(AdmissionConfig())


async def test_a_report_is_answered_with_what_the_others_know(settled: Router) -> None:
    first = await settled.report("a", report(), packed(10.0, 8.0, verify=1.2))
    second = await settled.report("b", report(), packed(5.0, 0.0, verify=3.0))
    assert first.policy is None
    assert list(counts(second.policy).values()) == [(10.0, 8.0)]
    news = await settled.report("b", report(number=1))  # of its requests alone
    assert news.knew and news.policy is None
    again = await settled.report("a", report(number=1), packed(10.0, 8.0, verify=1.2))
    assert list(counts(again.policy).values()) == [(5.0, 0.0)]
    assert again.policy is not None and again.policy.cost_factors == (("verify", 3.0),)


async def test_what_a_dead_replica_knew_stays_true(settled: Router) -> None:
    await settled.report("a", report(), packed())
    await settled.mark_dead("a")
    answer = await settled.report("b", report())
    assert list(counts(answer.policy).values()) == [(10.0, 8.0)]


@pytest.mark.parametrize(("wrong", "message"), FLAWS, ids=[message for _, message in FLAWS])
async def test_an_absurd_policy_does_not_void_its_report(
    settled: Router, wrong: Any, message: str
) -> None:
    await settled.report("a", report(free=0, running=1), packed())
    assert await settled.assign(ask("r"), 0.01) is None
    await settled.report("a", report(number=1), wrong)
    answer = await settled.assign(ask("r"), WAIT_S)
    assert answer is not None and answer.replica_id == "a"
    stats = await settled.stats()
    assert (stats.num_dropped_policies, stats.num_dropped_reports) == (1, 0)
    told = await settled.report("b", report())
    assert list(counts(told.policy).values()) == [(10.0, 8.0)]


async def test_an_absurd_report_does_not_void_its_policy(settled: Router) -> None:
    await settled.report("a", report(free=-1), packed())
    assert (await settled.stats()).num_dropped_reports == 1
    answer = await settled.report("b", report())
    assert list(counts(answer.policy).values()) == [(10.0, 8.0)]
