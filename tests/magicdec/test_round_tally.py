"""What steps are counted as, by those who drafted, what was accepted and where time went."""

import time
from pathlib import Path

import numpy as np
import pytest

from magicdec.batch import Batch, DraftChoice, Plan, ScheduledSequence, SequenceResult, StepResult
from magicdec.round_tally import NO_DRAFTER, RoundKind, RoundTally, RowKind
from magicdec.stats import StepForecast
from magicdec.types import SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run

PLAN = Plan("recycled", 4, 512)
DRAFT = DraftChoice("recycled", 4, 512, needs_history=False)


def nothing() -> None:
    """Is foreseen."""


def row(context: int, draft: DraftChoice | None = DRAFT) -> ScheduledSequence:
    """A decode row with so many tokens before it."""
    return share(context, 1, draft, num_prompt_tokens=context)


def share(
    num_computed: int, num_rows: int, draft: DraftChoice | None, num_prompt_tokens: int
) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=0,
        token_ids=np.zeros(num_rows, dtype=np.int64),
        num_computed_tokens=num_computed,
        block_table=np.zeros(0, dtype=np.int64),
        sampling=SamplingParams(),
        num_prompt_tokens=num_prompt_tokens,
        history=None,
        draft=draft,
    )


def outcome(num_drafted: int, num_accepted: int) -> SequenceResult:
    return SequenceResult((1,) * (num_accepted + 1), (1,) * num_drafted)


def step(*outcomes: SequenceResult) -> StepResult:
    return StepResult(outcomes, draft_seconds=0.02, verify_seconds=0.05)


def test_a_round_is_counted_by_its_plan_and_by_its_rows() -> None:
    tally = RoundTally()
    batch = Batch((row(3000), row(200)))
    tally.add(batch, step(outcome(4, 2), outcome(4, 4)), PLAN, nothing, 0.1)
    assert tally.rounds == {RoundKind("recycled", 4, 512, False): 1}
    assert tally.rows == {RowKind("recycled", 5, 4, 2): 1, RowKind("recycled", 1, 4, 4): 1}
    assert tally.num_emitted_tokens == 8
    assert tally.num_verify_positions == 3001 + 201
    assert tally.num_draft_positions == 4 * 512 + 4 * 201  # no more than there is
    assert (tally.draft_seconds, tally.verify_seconds, tally.step_seconds) == (0.02, 0.05, 0.1)
    assert tally.predicted_step_seconds == tally.plain_seconds == 0.0


def test_a_plain_round_has_no_drafter() -> None:
    tally = RoundTally()
    tally.add(Batch((row(300, None),)), step(outcome(0, 0)), Plan("recycled", 0, 512), nothing, 0.1)
    assert tally.rounds == {RoundKind(NO_DRAFTER, 0, 0.0, False): 1}
    assert tally.rows == {RowKind(NO_DRAFTER, 2, 0, 0): 1}


def test_a_step_of_prompts_alone_is_no_round_and_no_stall() -> None:
    tally = RoundTally()
    chunk = share(0, 64, None, num_prompt_tokens=100)
    tally.add(Batch((chunk,)), step(SequenceResult(())), PLAN, nothing, 0.1)
    assert not tally.rounds and not tally.rows
    assert tally.stall_seconds == 0.0 and tally.step_seconds == 0.1


def test_a_prompts_rows_stall_those_that_decode() -> None:
    batch = Batch((row(300), share(0, 15, None, num_prompt_tokens=100)))
    result = step(outcome(4, 0), SequenceResult(()))
    by_rows = RoundTally()
    by_rows.add(batch, result, PLAN, nothing, 0.1)
    assert by_rows.stall_seconds == pytest.approx(0.1 * 15 / 20)
    by_model = RoundTally()
    forecast = StepForecast(0.08, 0.07, 0.04, {})
    by_model.add(batch, result, PLAN, lambda: forecast, 0.1)
    assert by_model.stall_seconds == pytest.approx(0.1 * 0.04 / 0.08)


def test_plain_decoding_would_take_a_step_a_token() -> None:
    tally = RoundTally()
    forecast = StepForecast(seconds=0.12, plain_seconds=0.09, prefill_seconds=0.01, bounds={})
    batch = Batch((row(300), row(300)))
    tally.add(batch, step(outcome(4, 3), outcome(4, 1)), PLAN, lambda: forecast, 0.1)
    assert tally.plain_seconds == pytest.approx(0.01 + 3 * 0.08)  # 3 tokens a row on the mean
    assert tally.forecast_error_seconds == pytest.approx(0.02)
    assert (tally.foreseen_step_seconds, tally.predicted_step_seconds) == (0.1, 0.12)


def test_an_engine_hands_its_counts_over_once(
    make_engine: EngineFactory, tiny_model_dir: Path
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=3))
    requests = requests_of(random_prompts([40, 60]), [SamplingParams(max_tokens=20)] * 2)
    run(engine, requests)
    counts = engine.take_counts()
    rows, stats = counts.tally.rows, counts.stats
    assert sum(rows.values()) == stats.num_decode_rows > 0
    assert sum(n * kind.num_drafted for kind, n in rows.items()) == stats.num_draft_tokens
    assert sum(n * kind.num_accepted for kind, n in rows.items()) == stats.num_accepted_tokens
    assert sum(counts.tally.rounds.values()) == stats.num_rounds
    assert counts.blocks.num_held == 0
    pool = counts.blocks.num_held + counts.blocks.num_cached + counts.blocks.num_empty
    assert pool * engine.config.cache.block_size == counts.load.total_kv_tokens
    again = engine.take_counts()
    assert not again.tally.rows and again.stats == stats


def test_counting_a_full_batch_takes_a_fraction_of_a_millisecond() -> None:
    """Self-timed, and beside a clock around it: rounds of 16 sequences take 10 ms at the least."""
    batch = Batch(tuple(row(1000 * (i + 1)) for i in range(16)))
    result = step(*[outcome(4, i % 5) for i in range(16)])
    forecast = StepForecast(0.1, 0.1, 0.0, {"kv": 0.1})
    best = 1.0
    for _ in range(20):
        tally = RoundTally()
        started = time.perf_counter()
        for _ in range(10):
            tally.add(batch, result, PLAN, lambda: forecast, 0.1)
        taken = time.perf_counter() - started
        assert 0.5 * taken < tally.tally_seconds <= taken
        best = min(best, taken / 10)
    assert best < 100e-6
