"""What a verify forward's time goes to."""

import pytest

from magicdec.control.step_bounds import BOUNDS, Speeds, step_bounds, with_drafts
from magicdec.cost_model import StepCost, StepShape

VERIFY = StepCost(0.001, 0.010, 0.001, 1e-9, 1e-8, 0.0001)
PREFILL = StepCost(0.0, 0.010, 0.001, 0.0, 1e-8, 0.0)
NO_CHUNK = StepShape(0, 0.0, 0.0, 0)
AS_PROFILED = Speeds(compute=1.0, read=1.0, overhead=0.0)


def rows(count: int, context: int = 10_000) -> StepShape:
    return StepShape(count, 1e3 * count * context, float(count * context), count)


@pytest.mark.parametrize("count", [1, 4, 9, 11, 40])
def test_the_parts_are_all_of_the_forward(count: int) -> None:
    parts = step_bounds(VERIFY, PREFILL, rows(count), NO_CHUNK, AS_PROFILED)
    assert tuple(parts) == BOUNDS
    assert sum(parts.values()) == pytest.approx(VERIFY.seconds(rows(count)))


def test_few_rows_wait_for_weights_and_many_compute() -> None:
    few = step_bounds(VERIFY, PREFILL, rows(2), NO_CHUNK, AS_PROFILED)
    many = step_bounds(VERIFY, PREFILL, rows(20), NO_CHUNK, AS_PROFILED)
    assert few["weights"] == 0.010 and many["weights"] == 0.0
    assert many["compute"] > 0.020 > few["compute"]


def test_drafts_add_compute_and_no_reading() -> None:
    plain = step_bounds(VERIFY, PREFILL, rows(4), NO_CHUNK, AS_PROFILED)
    drafted = step_bounds(VERIFY, PREFILL, with_drafts(rows(4), 4), NO_CHUNK, AS_PROFILED)
    assert drafted["kv"] == plain["kv"]
    assert drafted["compute"] > plain["compute"]


def test_a_prompts_chunk_makes_a_forward_compute() -> None:
    chunk = StepShape(64, 0.0, 64 * 100.0, 0)
    parts = step_bounds(VERIFY, PREFILL, rows(1), chunk, AS_PROFILED)
    assert parts["weights"] == 0.0 and parts["compute"] > 0.065


def test_a_slow_machine_is_slow_in_what_it_is_slow_at() -> None:
    slow = step_bounds(VERIFY, PREFILL, rows(4), NO_CHUNK, Speeds(1.0, 3.0, 0.5))
    usual = step_bounds(VERIFY, PREFILL, rows(4), NO_CHUNK, AS_PROFILED)
    assert slow["kv"] == pytest.approx(3 * usual["kv"])
    assert slow["overhead"] == pytest.approx(usual["overhead"] + 0.5)
    assert slow["weights"] == usual["weights"]
