"""Live times tell a machine that slows down from flaws of its profile, and stalls from changes."""

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.control.step_corrections import COMPUTE, EXTRA_ROWS, READ, Part, StepCorrections
from magicdec.cost_model import draft_kind
from magicdec.profiling.step_profile import PREFILL

DRAFT = draft_kind("recycled")
FLAWS = (EXTRA_ROWS, PREFILL, DRAFT)
# Seconds as profiled.
SHORT: list[Part] = [(0.060, (COMPUTE,)), (0.002, (READ,))]
PLAIN: list[Part] = [(0.060, (COMPUTE,)), (0.040, (READ,))]
EXTRA: Part = (0.040, (COMPUTE, EXTRA_ROWS))
DRAFTS: list[Part] = [(0.070, (COMPUTE, DRAFT)), (0.010, (READ, DRAFT))]
CHUNK: list[Part] = [(0.500, (COMPUTE, PREFILL))]


@dataclass
class Machine:
    """What steps really take, with noise of a few percent."""

    speed: float = 1.0
    read: float = 1.0
    rows: float = 1.0
    drafts: float = 1.0
    prefill: float = 1.0
    seed: int = 0
    spread: float = 0.05

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def seconds(self, *parts: Part) -> float:
        flaws = {EXTRA_ROWS: self.rows, DRAFT: self.drafts, PREFILL: self.prefill, READ: self.read}
        return sum(
            self.speed * math.prod([s, *(flaws.get(kind, 1.0) for kind in kinds)])
            for s, kinds in parts
        )

    def play(
        self,
        corrections: StepCorrections,
        parts: list[Part] = PLAIN,
        *,
        drafted: bool = False,
        stall: float = 0.0,
    ) -> None:
        corrections.pass_round()
        if drafted:
            took = self.seconds(*DRAFTS) * self.noise()
            corrections.observe(DRAFT, DRAFTS, took)
            parts = [*parts, EXTRA]
        corrections.observe("forward", parts, self.seconds(*parts) * self.noise() + stall)

    def noise(self) -> float:
        return math.exp(self.random.gauss(0.0, self.spread))

    def plain(self) -> float:
        return self.seconds(*PLAIN)

    def drafted(self) -> float:
        return self.seconds(*PLAIN, EXTRA, *DRAFTS)


def foreseen(corrections: StepCorrections, *parts: Part) -> float:
    return sum(seconds * corrections.factor(*kinds) for seconds, kinds in parts)


def plain(corrections: StepCorrections) -> float:
    return foreseen(corrections, *PLAIN)


def drafted(corrections: StepCorrections) -> float:
    return foreseen(corrections, *PLAIN, EXTRA, *DRAFTS)


@pytest.mark.parametrize("flaw", [0.5, 0.7, 1.5])
def test_plain_rounds_after_drafted_ones_settle_what_the_profile_missed(flaw: float) -> None:
    """Drafted rounds alone look like a machine of another speed. Believed, they would have plain
    rounds seem as fast, and then drafts as slow, as neither is."""
    corrections, machine = StepCorrections(FLAWS), Machine(rows=flaw, drafts=flaw)
    for _ in range(20):
        machine.play(corrections, drafted=True)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.05)
    for _ in range(8):
        machine.play(corrections)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.06)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.15)


def test_a_machine_that_slows_down_in_plain_rounds_slows_drafts_too() -> None:
    corrections, machine = StepCorrections(FLAWS), Machine(rows=0.6)
    for turn in range(60):
        machine.play(corrections, drafted=turn % 6 == 0)
    machine.speed = 1.5
    for _ in range(10):
        machine.play(corrections)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.1)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.12)


def test_a_plain_round_now_and_then_holds_plain_decoding_to_what_it_takes() -> None:
    """Long drafted rounds move what plain ones seem to take; a fast time is no stall."""
    corrections, machine = StepCorrections(FLAWS), Machine(rows=2.5, drafts=2.0)
    for turn in range(120):
        machine.play(corrections, drafted=turn % 30 != 29)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.12)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.1)


@settings(max_examples=30, deadline=None)
@given(stall=st.floats(0.1, 5.0), seed=st.integers(0, 999), drafts=st.booleans())
def test_one_stall_moves_little(stall: float, seed: int, drafts: bool) -> None:
    corrections, machine = StepCorrections(FLAWS), Machine(seed=seed)
    for _ in range(30):
        machine.play(corrections, drafted=drafts)
    before = plain(corrections), drafted(corrections)
    machine.play(corrections, drafted=drafts, stall=stall)
    assert plain(corrections) == pytest.approx(before[0], rel=0.1)
    assert drafted(corrections) == pytest.approx(before[1], rel=0.1)


@pytest.mark.parametrize("change", [0.5, 1.3, 3.0])
def test_a_lasting_change_is_followed_within_some_rounds(change: float) -> None:
    corrections, machine = StepCorrections(FLAWS), Machine(spread=0.02)
    for _ in range(30):
        machine.play(corrections)
    machine.speed = change
    for _ in range(12):
        machine.play(corrections)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.15)


@given(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e5, 1e-7, 1e308]))
def test_absurd_times_are_counted_and_move_nothing(wrong: float) -> None:
    corrections = StepCorrections(FLAWS)
    before = corrections.factors
    corrections.observe(DRAFT, DRAFTS, wrong)
    corrections.observe("forward", PLAIN, wrong)
    assert corrections.num_dropped == 2
    assert corrections.factors == before
    assert corrections.observed_factors == {}


def test_what_others_found_counts_until_something_is_seen_here() -> None:
    corrections = StepCorrections(FLAWS)
    corrections.begin_at({COMPUTE: 2.0, READ: 2.0, DRAFT: 1.5, "draft:unknown": 9.0})
    assert corrections.factor(COMPUTE) == pytest.approx(2.0)
    Machine(speed=2.0).play(corrections)
    corrections.begin_at({COMPUTE: 5.0, DRAFT: 1.2})
    assert corrections.factor(COMPUTE) == pytest.approx(2.0, rel=0.1)
    assert corrections.factor(DRAFT) == pytest.approx(1.2)


def test_a_kind_that_was_long_unseen_is_no_surer_nor_wilder_than_at_the_beginning() -> None:
    """Batches that change every round leave room for one odd time of it to be a stall."""
    corrections, machine = StepCorrections(FLAWS), Machine()
    for _ in range(3000):
        corrections.expect_another_load()
        machine.play(corrections)
    before = corrections.factors
    corrections.observe(DRAFT, DRAFTS, 5.0 * foreseen(corrections, *DRAFTS))
    assert corrections.factors == before
    machine.drafts = 1.3
    for _ in range(12):
        machine.play(corrections, drafted=True)
        machine.play(corrections)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.1)


@pytest.mark.parametrize(("speed", "read"), [(0.5, 2.6), (1.5, 0.7)])
def test_slow_cores_are_told_from_slow_memory_by_another_context(speed: float, read: float) -> None:
    """A profile of a busy moment holds for no other one: what drafts take, which compute more than
    they read, is foreseen all the same, before anybody drafts."""
    corrections, machine = StepCorrections(FLAWS), Machine(speed=speed, read=read)
    for _ in range(20):
        machine.play(corrections, SHORT)
    for _ in range(20):
        machine.play(corrections)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.08)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.08)


def test_prompts_show_how_slow_the_machine_is_and_rounds_settle_what_their_profile_missed() -> None:
    corrections, machine = StepCorrections(FLAWS), Machine(prefill=1.4)
    for _ in range(10):
        machine.play(corrections, CHUNK)
    assert foreseen(corrections, *CHUNK) == pytest.approx(machine.seconds(*CHUNK), rel=0.1)
    assert 1.05 < corrections.factor(COMPUTE) < 1.35
    for _ in range(12):
        machine.play(corrections)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.08)
    assert foreseen(corrections, *CHUNK) == pytest.approx(machine.seconds(*CHUNK), rel=0.15)
