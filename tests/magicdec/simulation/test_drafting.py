"""What simulated replicas draft, and what their rounds take."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.batch import Plan
from magicdec.config import MAX_DRAFT_LENGTH, ConfigError
from magicdec.control.draft_length import ControllerConfig, DraftController
from magicdec.control.round_choice import RoundChoice, RowOutcome
from magicdec.control.round_costs import RoundLoad
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import AdaptiveDrafting, Drafts
from magicdec.simulation.jobs import Job, answer_paths
from magicdec.simulation.replica import SimulatedReplica
from magicdec.simulation.round_seconds import RememberedCosts, most_rows_within, round_seconds
from magicdec.simulation.steps import EngineShape
from magicdec.simulation.trace import TraceRequest
from tests.magicdec.simulation.clusters import COSTS, Linear

LONG = TraceRequest(0.0, 2000, 4000, 4000)
FOUR = Plan("recycled", 4, 512)


def mean_run(runs: bytes, length: int) -> float:
    return float(np.minimum(np.frombuffer(runs, np.uint8), length).mean())


def test_drafts_are_accepted_as_often_as_the_trace_says() -> None:
    """A run of at most 4 has mean a + a^2 + a^3 + a^4; within five standard errors."""
    for acceptance in (0.0, 0.3, 0.8, 1.0):
        request = TraceRequest(0.0, 100, 20_000, 20_000, acceptance=acceptance)
        expected = sum(acceptance**n for n in range(1, 5))
        assert mean_run(AcceptanceLaw().runs(request, 3), 4) == pytest.approx(expected, abs=0.1)


def test_requests_differ_by_the_spread_and_not_by_chance() -> None:
    alike = [mean_run(AcceptanceLaw(0.8, 0.0).runs(LONG, n), 1) for n in range(50)]
    apart = [mean_run(AcceptanceLaw(0.8, 0.5).runs(LONG, n), 1) for n in range(50)]
    assert np.std(alike) < 0.02 < 0.05 < np.std(apart)
    assert np.median(apart) == pytest.approx(0.8, abs=0.06)
    law = AcceptanceLaw(seed=4)
    assert law.runs(LONG, 7) == law.runs(LONG, 7) != law.runs(LONG, 8)
    assert law.runs(LONG, 7) != AcceptanceLaw(seed=5).runs(LONG, 7)


@given(st.binary(min_size=1, max_size=60), st.integers(0, 16), st.integers(1, 20))
def test_paths_end_with_the_first_answer(runs: bytes, length: int, most: int) -> None:
    runs = bytes(min(run, MAX_DRAFT_LENGTH) for run in runs)
    jobs = [
        Job(i, TraceRequest(0.0, 10, n, n), 0.0, runs, emitted=min(1, n - 1))
        for i, n in enumerate({len(runs), max(len(runs) // 2, 1)})
    ]
    num_rounds, paths = answer_paths(jobs, [length] * len(jobs), most)
    assert 1 <= num_rounds <= most
    for job, path in zip(jobs, paths, strict=True):
        path = path[: num_rounds + 1]
        steps = np.diff(path)
        assert path[0] == job.emitted and len(path) == num_rounds + 1
        assert np.all(steps >= 1) and np.all(steps <= length + 1)
        assert all(p < job.trace.num_output_tokens for p in path[:-1])
    ended = [p[num_rounds] == j.trace.num_output_tokens for j, p in zip(jobs, paths, strict=True)]
    assert any(ended) or num_rounds == most


LOAD = RoundLoad((2000, 3000, 4000), request_keys=("a", "b", "c"), draft_limits=(9, 9, 9))


def test_rows_alike_take_what_the_cost_model_says() -> None:
    for length in (0, 4):
        seconds = COSTS.seconds(LOAD, "recycled", length, 512)
        assert round_seconds(COSTS, LOAD, FOUR, [length] * 3) == seconds


def test_rows_that_draft_less_save_their_part() -> None:
    plain, all_draft = (round_seconds(Linear(), LOAD, FOUR, [n] * 3) for n in (0, 4))
    one = round_seconds(Linear(), LOAD, FOUR, [4, 0, 0])
    assert one - plain == pytest.approx((all_draft - plain) / 3)
    some = round_seconds(COSTS, LOAD, FOUR, [4, 1, 0])
    whole = round_seconds(COSTS, LOAD, FOUR, [4, 4, 4])
    assert round_seconds(COSTS, LOAD, FOUR, [0, 0, 0]) < some < whole


@given(st.integers(1, 4000), st.floats(0.001, 5.0))
def test_the_most_rows_within_the_target_are_found(num_rows: int, target_s: float) -> None:
    found = most_rows_within(lambda n: 1e-3 * n, num_rows, target_s)
    assert min(num_rows, 64) <= found <= num_rows
    assert found == min(num_rows, 64) or 1e-3 * found <= target_s
    assert found == num_rows or 1e-3 * (found + 1) > target_s


@dataclass
class Asked(Linear):
    loads: list[RoundLoad] = field(default_factory=list)

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        self.loads.append(load)
        return super().seconds(load, drafter, draft_length, draft_budget)


@given(st.lists(st.integers(1, 100_000), max_size=6), st.integers(0, 2048))
def test_remembered_costs_are_those_of_loads_alike(contexts: list[int], rows: int) -> None:
    asked = Asked()
    costs = RememberedCosts(asked)
    load = RoundLoad(tuple(contexts), rows, 1000.0 * rows)
    near = RoundLoad(tuple(c + c // 200 for c in contexts), rows, 1003.0 * rows)
    exact = Linear().seconds(load, "recycled", 2, 512)
    assert costs.seconds(load, "recycled", 2, 512) == exact
    assert costs.seconds(load, "recycled", 2, 512) == exact
    assert len(asked.loads) == 1
    assert costs.seconds(near, "recycled", 2, 512) == pytest.approx(exact, rel=0.015)


class Recording(DraftController):
    """A controller that keeps what it was asked and told."""

    def __init__(self) -> None:
        axes = AcceptanceAxes(("recycled",), (512,))
        super().__init__(AcceptanceModel(axes), COSTS, ControllerConfig(exploration_share=0.0))
        self.asked: list[RoundLoad] = []
        self.told: list[Sequence[RowOutcome]] = []

    def choose(self, load: RoundLoad) -> RoundChoice:
        self.asked.append(load)
        return super().choose(load)

    def observe(
        self, load: RoundLoad, choice: RoundChoice, outcomes: Sequence[RowOutcome], seconds: float
    ) -> None:
        assert load is self.asked[-1]
        self.told.append(outcomes)
        super().observe(load, choice, outcomes, seconds)


def test_a_choice_holds_for_some_rounds_of_loads_alike() -> None:
    controller = Recording()
    drafting = AdaptiveDrafting(controller, 16)
    for num_rounds in (10, 5, 1, 16):
        choice = drafting.choose(LOAD)
        assert num_rounds <= drafting.most_rounds <= 16
        drafting.observe([RowOutcome(choice.plan.draft_length, 0)] * 3, num_rounds, 0.01)
    assert len(controller.asked) == len(controller.told) == 2
    drafting.choose(replace(LOAD, context_lens=(20_000, 30_000, 40_000)))
    assert len(controller.asked) == 3


def test_prompts_in_the_round_do_not_move_the_choice() -> None:
    controller = Recording()
    AdaptiveDrafting(controller, 1).choose(LOAD.with_rows(2048, 1e6))
    assert controller.asked == [LOAD]


def first_lengths(drafts: Drafts, request: TraceRequest) -> set[float]:
    """Tokens drafted a round, over the life of one request that is alone."""
    engine = EngineShape(100_000, max_batch_tokens=2048)
    replica = SimulatedReplica(engine, COSTS, drafts.drafting(COSTS), AcceptanceLaw())
    end: float | None = replica.submit(Job(0, request, 0.0), 0.0)
    lengths: set[float] = set()
    while end is not None:
        before = replica.num_row_rounds, replica.num_draft_tokens
        _, _, end = replica.end_rounds(end)
        if replica.num_row_rounds > before[0]:
            rounds = replica.num_row_rounds - before[0]
            lengths.add((replica.num_draft_tokens - before[1]) / rounds)
    return lengths


def test_nothing_is_drafted_over_a_view_that_is_too_much_of_the_context() -> None:
    """A third of the context is 512 from 1,536 on."""
    assert first_lengths(Drafts(4), TraceRequest(0.0, 1000, 300, 300)) == {0.0}
    assert first_lengths(Drafts(4), TraceRequest(0.0, 1536, 300, 10_000)) == {4.0}
    assert 4.0 in first_lengths(Drafts(4), TraceRequest(0.0, 1300, 500, 1000))


def test_the_controller_learns_whose_drafts_are_worth_it() -> None:
    """From the same prior, alone on a replica where drafts cost little."""
    bad = TraceRequest(0.0, 8000, 2000, 2000, acceptance=0.02)
    good = TraceRequest(0.0, 8000, 2000, 2000, acceptance=0.98)
    rates = []
    for request in (bad, good):
        drafting = Drafts().drafting(Linear())
        replica = SimulatedReplica(EngineShape(100_000), Linear(), drafting, AcceptanceLaw())
        end: float | None = replica.submit(Job(0, request, 0.0), 0.0)
        while end is not None:
            _, _, end = replica.end_rounds(end)
        rates.append(replica.num_draft_tokens / replica.num_row_rounds)
    assert rates[0] < 1.5 < 3.0 < rates[1]


def test_impossible_drafts_are_named() -> None:
    with pytest.raises(ConfigError, match="draft must be adaptive or a draft length, got 'fast'"):
        Drafts.parse("fast", "recycled", 512, 1)
    with pytest.raises(ConfigError, match="draft_length must be at most 16, got 17"):
        Drafts.parse("17", "recycled", 512, 1)
    with pytest.raises(ConfigError, match="rounds_per_choice must be at least 1, got 0"):
        Drafts(rounds_per_choice=0)
    with pytest.raises(
        ConfigError, match="drafter must be one of streaming, snapkv, recycled here"
    ):
        Drafts(drafter="nobody")
    with pytest.raises(ConfigError, match=r"acceptance must be between 0 and 1, got 1\.0"):
        AcceptanceLaw(1.0)
    with pytest.raises(ConfigError, match="acceptance_spread must be at least 0, got -1"):
        AcceptanceLaw(spread=-1)
    with pytest.raises(ConfigError, match="inter_token_target_s must be above 0, got 0"):
        EngineShape(1000, inter_token_target_s=0.0)
    with pytest.raises(ConfigError, match="max_batch_tokens must be at least 48, got 47"):
        EngineShape(1000, max_batch_tokens=47)
