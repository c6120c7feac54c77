"""Live times tell a machine that slows down from flaws of its profile, and stalls from changes."""

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.control.step_corrections import EXTRA_ROWS, StepCorrections
from magicdec.cost_model import VERIFY, draft_kind

DRAFT = draft_kind("recycled")
PLAIN, EXTRA, DRAFTS = 0.100, 0.040, 0.080  # seconds, as profiled


@dataclass
class Machine:
    """What steps really take, with noise of a few percent."""

    speed: float = 1.0
    rows: float = 1.0
    drafts: float = 1.0
    seed: int = 0
    spread: float = 0.05

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def noise(self) -> float:
        return self.speed * math.exp(self.random.gauss(0.0, self.spread))

    def play(self, corrections: StepCorrections, *, drafted: bool, stall: float = 0.0) -> None:
        if drafted:
            corrections.observe_drafts(DRAFT, DRAFTS, self.noise() * self.drafts * DRAFTS)
        extra = EXTRA if drafted else 0.0
        took = self.noise() * (PLAIN + self.rows * extra) + stall
        corrections.observe_forward(PLAIN, extra, took)

    def plain(self) -> float:
        return self.speed * PLAIN

    def drafted(self) -> float:
        return self.speed * (PLAIN + self.rows * EXTRA + self.drafts * DRAFTS)


def plain(corrections: StepCorrections) -> float:
    return corrections.factor(VERIFY) * PLAIN


def drafted(corrections: StepCorrections) -> float:
    rows, drafts = corrections.factor(EXTRA_ROWS), corrections.factor(DRAFT)
    return corrections.factor(VERIFY) * (PLAIN + rows * EXTRA + drafts * DRAFTS)


@pytest.mark.parametrize("flaw", [0.5, 0.7, 1.5])
def test_plain_rounds_after_drafted_ones_settle_what_the_profile_missed(flaw: float) -> None:
    """Drafted rounds alone look like a machine of another speed. Believed, they would have plain
    rounds seem as fast, and then drafts as slow, as neither is."""
    corrections, machine = StepCorrections([DRAFT]), Machine(rows=flaw, drafts=flaw)
    for _ in range(20):
        machine.play(corrections, drafted=True)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.05)
    for _ in range(8):
        machine.play(corrections, drafted=False)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.06)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.15)


def test_a_machine_that_slows_down_in_plain_rounds_slows_drafts_too() -> None:
    corrections, machine = StepCorrections([DRAFT]), Machine(rows=0.6)
    for turn in range(60):
        machine.play(corrections, drafted=turn % 6 == 0)
    machine.speed = 1.5
    for _ in range(10):
        machine.play(corrections, drafted=False)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.1)
    assert drafted(corrections) == pytest.approx(machine.drafted(), rel=0.12)


@settings(max_examples=30, deadline=None)
@given(stall=st.floats(0.1, 5.0), seed=st.integers(0, 999), drafts=st.booleans())
def test_one_stall_moves_little(stall: float, seed: int, drafts: bool) -> None:
    corrections, machine = StepCorrections([DRAFT]), Machine(seed=seed)
    for _ in range(30):
        machine.play(corrections, drafted=drafts)
    before = plain(corrections), drafted(corrections)
    machine.play(corrections, drafted=drafts, stall=stall)
    assert plain(corrections) == pytest.approx(before[0], rel=0.1)
    assert drafted(corrections) == pytest.approx(before[1], rel=0.1)


@pytest.mark.parametrize("change", [0.5, 1.3, 3.0])
def test_a_lasting_change_is_followed_within_some_rounds(change: float) -> None:
    corrections, machine = StepCorrections([DRAFT]), Machine(spread=0.02)
    for _ in range(30):
        machine.play(corrections, drafted=False)
    machine.speed = change
    for _ in range(12):
        machine.play(corrections, drafted=False)
    assert plain(corrections) == pytest.approx(machine.plain(), rel=0.15)


@given(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e5, 1e-7, 1e308]))
def test_absurd_times_are_counted_and_move_nothing(wrong: float) -> None:
    corrections = StepCorrections([DRAFT])
    before = corrections.factors
    corrections.observe_drafts(DRAFT, DRAFTS, wrong)
    corrections.observe_forward(PLAIN, EXTRA, wrong)
    assert corrections.num_dropped == 2
    assert corrections.factors == before
    assert corrections.observed_factors == {}


def test_what_others_found_counts_until_something_is_seen_here() -> None:
    corrections = StepCorrections([DRAFT])
    corrections.begin_at({VERIFY: 2.0, DRAFT: 1.5, "draft:unknown": 9.0})
    assert corrections.factor(VERIFY) == pytest.approx(2.0)
    Machine(speed=2.0).play(corrections, drafted=False)
    corrections.begin_at({VERIFY: 5.0, DRAFT: 1.2})
    assert corrections.factor(VERIFY) == pytest.approx(2.0, rel=0.1)
    assert corrections.factor(DRAFT) == pytest.approx(1.2)


def test_a_kind_that_was_long_unseen_is_no_surer_nor_wilder_than_at_the_beginning() -> None:
    """Batches that change every round leave room for one odd time of it to be a stall."""
    corrections, machine = StepCorrections([DRAFT]), Machine()
    for _ in range(3000):
        corrections.expect_another_load()
        machine.play(corrections, drafted=False)
    corrections.observe_drafts(DRAFT, DRAFTS, 5.0 * DRAFTS)
    assert corrections.factor(DRAFT) == 1.0
    for _ in range(8):
        corrections.observe_drafts(DRAFT, DRAFTS, 1.3 * DRAFTS)
        machine.play(corrections, drafted=False)
    assert corrections.factor(DRAFT) == pytest.approx(1.3, rel=0.1)
