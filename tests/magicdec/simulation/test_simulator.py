"""The cluster as a whole: against queueing theory, and the policies against each other."""

import dataclasses
import time

import pytest

from magicdec.config import ConfigError
from magicdec.control.round_costs import RoundCosts
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import Drafts
from magicdec.simulation.policies import POLICIES
from magicdec.simulation.result import SimulationResult
from magicdec.simulation.simulator import ClusterConfig, Workload, simulate
from magicdec.simulation.steps import EngineShape
from magicdec.simulation.trace import PoissonTraffic, TraceError, TraceRequest
from tests.magicdec.simulation.clusters import COSTS, ENGINE, Constant, cluster

PLAIN, ADAPTIVE = Drafts(0), Drafts(rounds_per_choice=64)
MIXED = PoissonTraffic(
    600,
    30.0,
    prompt_tokens=(200, 20_000),
    output_tokens=(20, 400),
    max_tokens=2048,
    prefix_share=0.5,
    num_prefixes=40,
    num_prefix_tokens=4000,
    num_keys=4,
    seed=3,
)


def run(
    policy: str,
    traffic: PoissonTraffic = MIXED,
    config: ClusterConfig | None = None,
    drafts: Drafts = PLAIN,
    costs: RoundCosts = COSTS,
    law: AcceptanceLaw | None = None,
) -> SimulationResult:
    workload = Workload(traffic.requests(), law or AcceptanceLaw())
    return simulate(workload, policy, drafts, config or cluster(16), costs)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trace_gives_one_result_in_which_everyone_is_counted(policy: str) -> None:
    result = run(policy)
    assert result.num_finished + result.num_refused == MIXED.num_requests
    assert result.num_refused == 0
    assert result.policy == policy and result.num_replicas == 16
    assert sum(c.num_requests for c in result.first_token_by_class) == MIXED.num_requests
    for latency in (result.first_token, *(c.first_token for c in result.first_token_by_class)):
        assert 0.0 < latency.p50 <= latency.p90 <= latency.p99
    outputs = sum(r.num_output_tokens for r in MIXED.requests())
    assert result.output_tokens_per_s * result.duration_s == pytest.approx(outputs)
    assert 0.0 < result.busy_share <= 1.0 <= result.imbalance
    assert result == run(policy)


@pytest.mark.parametrize("policy", ["least-requests", "kv-aware+prefix+classes"])
def test_one_seat_of_constant_service_waits_as_theory_says(policy: str) -> None:
    """M/D/1 at a load of 0.7: the mean wait is 0.7 / (2 * 0.3) services (Pollaczek-Khinchine)."""
    traffic = PoissonTraffic(8000, 7.0, (300, 300), (1, 1), seed=5)
    config = dataclasses.replace(
        cluster(1, EngineShape(10_000, max_num_seqs=1), max_queued_requests=1000),
        hop_s=0.0,
        least_report_period_s=0.0,
    )
    result = run(policy, traffic, config, costs=Constant())
    assert result.num_finished == 8000
    assert result.busy_share == pytest.approx(0.7, rel=0.03)
    assert result.first_token.mean == pytest.approx(0.1 + 0.1 * 0.7 / 0.6, rel=0.08)


def test_tokens_count_for_more_than_requests() -> None:
    """KV and prefill tell a long prompt from a short one; counting requests does not."""
    counting, aware = run("least-requests"), run("kv-aware")
    assert aware.first_token.p90 < counting.first_token.p90
    assert aware.output_tokens_per_s > 0.98 * counting.output_tokens_per_s


def test_prompts_that_begin_alike_are_sent_where_that_is_cached() -> None:
    apart, together = run("kv-aware"), run("kv-aware+prefix+classes")
    assert together.cached_share > 1.5 * apart.cached_share
    assert together.first_token.p90 < apart.first_token.p90


@pytest.mark.parametrize("acceptance", [0.3, 0.9])
def test_adaptive_drafts_are_about_as_fast_as_the_best_fixed_length(acceptance: float) -> None:
    """Over long contexts and with few prompts beside them; what is short of the best is learning
    and the price of trying."""
    traffic = PoissonTraffic(60, 4.0, (8000, 20_000), (400, 800), seed=3)
    law = AcceptanceLaw(acceptance)
    adaptive, *fixed = (
        run("kv-aware", traffic, cluster(8), drafts, law=law).token_latency.mean
        for drafts in (ADAPTIVE, *(Drafts(n) for n in (0, 2, 4, 6)))
    )
    assert adaptive <= 1.05 * min(fixed)
    assert max(fixed) > 1.15 * min(fixed)


def test_more_than_the_cluster_can_hold_is_refused() -> None:
    traffic = dataclasses.replace(MIXED, num_requests=300, requests_per_s=300.0)
    config = cluster(2, max_queued_requests=20)
    result = run("kv-aware+prefix+classes", traffic, config)
    assert result.num_refused > 0
    assert result.num_finished + result.num_refused == 300
    assert result.num_preemptions == 0


@pytest.mark.parametrize("policy", ["least-requests", "kv-aware"])
def test_room_kept_for_answers_keeps_replicas_from_preempting(policy: str) -> None:
    """Answers that use up their limit, in pools that are small for them."""
    traffic = PoissonTraffic(200, 200.0, (500, 4000), (400, 400), seed=2)
    engine = EngineShape(20_000, max_num_seqs=64, max_batch_tokens=2048)
    result = run(policy, traffic, cluster(4, engine, max_queued_requests=500))
    assert result.num_finished == 200
    assert result.num_preemptions == 0


def test_what_cannot_be_simulated_is_named() -> None:
    with pytest.raises(TraceError, match="needs 500001 KV tokens"):
        simulate(Workload([TraceRequest(0.0, 500_000, 1, 1)]), "kv-aware", PLAIN, cluster(1), COSTS)
    with pytest.raises(ConfigError, match="num_replicas must be at least 1, got 0"):
        ClusterConfig(0, ENGINE)
    with pytest.raises(ConfigError, match=r"report_period_s must be at least 0\.05, got 0\.01"):
        ClusterConfig(1, ENGINE, report_period_s=0.01)
    with pytest.raises(KeyError):
        run("fastest")


def test_progress_counts_requests() -> None:
    told: list[int] = []
    workload = Workload(MIXED.requests())
    simulate(workload, "least-requests", PLAIN, cluster(16), COSTS, told.append)
    assert told == sorted(told)
    assert 0 < told[-1] <= MIXED.num_requests


def seconds_per_replica(num_replicas: int) -> float:
    """Processor time by the replica, for 100 requests and adaptive drafts on each."""
    count = 100 * num_replicas
    traffic = dataclasses.replace(MIXED, num_requests=count, requests_per_s=2.0 * num_replicas)
    config = cluster(num_replicas, max_queued_requests=count // 10)
    start = time.process_time()
    result = run("kv-aware+prefix+classes", traffic, config, ADAPTIVE)
    seconds = time.process_time() - start
    assert result.num_finished == count
    assert result.mean_draft_length > 0.0
    return seconds / num_replicas


def test_a_hundred_requests_on_a_replica_take_a_fraction_of_a_second() -> None:
    """A thousand replicas have 0.3 s each; machines that are busy otherwise get the double."""
    assert seconds_per_replica(10) < 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_replicas_and_a_hundred_thousand_requests_take_minutes() -> None:
    assert 1000 * seconds_per_replica(1000) < 300.0
