"""Round costs by a profile: their parts, their corrections, and how fast they are asked for."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.batch import Batch, StepResult
from magicdec.config import (
    DraftModelConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_shapes import RoundShapes
from magicdec.control.step_corrections import COMPUTE, READ
from magicdec.cost_model import VERIFY, CostModel, StepCost, StepShape, draft_kind
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.profiling.step_profile import PREFILL, StepProfile, begin_kind, observe_kind
from magicdec.roofline import ModelGeometry
from magicdec.types import SamplingParams
from tests.magicdec.profiling.planted_executor import GEOMETRY, PLANTED, PlantedExecutor
from tests.timing import work_units

CONFIG = EngineConfig(ModelConfig("planted"), scheduler=SchedulerConfig(16, 2048))
POOL = ProbePool(CONFIG, 4000, 9000)
FREE = StepCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
PROFILE = StepProfile(CostModel({**PLANTED, draft_kind("ngram"): FREE}))
LENS = (4000, 900, 2500)
LOAD = RoundLoad(LENS)
GREEDY = SamplingParams(temperature=0.0)
WINDOWED = replace(GEOMETRY, sliding_windows=(128,) * 10 + (None,) * 15 + (512,) * 5)


def round_costs(profile: StepProfile = PROFILE) -> ProfiledRoundCosts:
    return ProfiledRoundCosts(profile, GEOMETRY, CONFIG.speculation)


def seconds(kind: str, lens: list[int], num_rows: int = 1) -> float:
    return PLANTED[kind].seconds(GEOMETRY.step_shape([num_rows] * len(lens), lens))


@given(
    st.sampled_from([GEOMETRY, WINDOWED]),
    st.lists(st.integers(1, 9000), min_size=1, max_size=9),
    st.integers(1, 17),
)
def test_shapes_are_those_of_the_geometry(
    geometry: ModelGeometry, lens: list[int], num_rows: int
) -> None:
    """Which adds up sequence by sequence, and layer by layer where windows differ."""
    found = RoundShapes(geometry, CONFIG.speculation).rows(np.array(lens, dtype=float), num_rows)
    expected = geometry.step_shape([num_rows] * len(lens), lens)
    assert (found.num_rows, found.num_sequences) == (expected.num_rows, expected.num_sequences)
    assert found.kv_bytes == pytest.approx(expected.kv_bytes)
    assert found.row_products == pytest.approx(expected.row_products)


@given(st.sampled_from(sorted(PLANTED)), st.lists(st.integers(1, 9000), min_size=1, max_size=9))
def test_all_numbers_of_rows_at_once_are_each_alone(kind: str, lens: list[int]) -> None:
    profile = StepProfile(PROFILE.model, ((2, -0.3), (5, 0.01), (64, 0.2)))
    shapes = RoundShapes(GEOMETRY, CONFIG.speculation)
    contexts = np.array(lens, dtype=float)
    found = profile.seconds_by_rows(kind, shapes.rows(contexts), 17)
    expected = [profile.seconds(kind, shapes.rows(contexts, n)) for n in range(1, 18)]
    assert found == pytest.approx(expected) and min(found) > 0.0


@pytest.mark.parametrize(
    "rows", [((4, 0.1), (1, 0.1)), ((0, 0.1),), ((65, 0.1),), ((1, math.nan),)]
)
def test_departures_that_cannot_be_are_refused(rows: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="row_seconds must"):
        StepProfile(PROFILE.model, rows)


@pytest.mark.parametrize("length", [1, 4, 16])
def test_a_round_is_its_draft_steps_what_begins_them_and_the_verify_forward(length: int) -> None:
    views = [min(n, 1024) for n in LENS]
    drafting = seconds(begin_kind("snapkv"), views) + length * seconds(draft_kind("snapkv"), views)
    expected = drafting + seconds(VERIFY, list(LENS), 1 + length)
    assert round_costs().seconds(LOAD, "snapkv", length, 1024) == pytest.approx(expected)


def test_length_0_is_the_plain_step_whoever_is_named() -> None:
    costs = round_costs()
    plain = seconds(VERIFY, list(LENS))
    for name in ("streaming", "recycled", "ngram", "nobody"):
        assert costs.seconds(LOAD, name, 0, 512) == pytest.approx(plain)


def test_a_drafter_without_a_profile_is_refused() -> None:
    with pytest.raises(KeyError, match=r"no cost of 'draft:top_k'; known are .*draft:snapkv"):
        round_costs().seconds(LOAD, "top_k", 4, 512)


def test_a_share_of_the_context_is_read_up_to_the_largest_budget() -> None:
    lens = [80_000, 900]
    views = [CONFIG.speculation.max_draft_budget, 225]
    expected = seconds(draft_kind("streaming"), views)
    costs, load = round_costs(), RoundLoad(tuple(lens))
    two = costs.seconds(load, "streaming", 2, 0.25) - costs.seconds(load, "streaming", 1, 0.25)
    assert two == pytest.approx(expected + PLANTED[VERIFY].per_row_product * sum(lens))


def test_a_draft_model_reads_its_window_whatever_the_budget() -> None:
    config = SpeculativeConfig(draft_model=DraftModelConfig("small", window=256))
    model = CostModel({**PLANTED, draft_kind("draft_model"): PLANTED[draft_kind("streaming")]})
    costs = ProfiledRoundCosts(StepProfile(model), GEOMETRY, config)
    expected = seconds(draft_kind("streaming"), [256] * 3) + seconds(VERIFY, list(LENS), 2)
    for budget in (128, 4096):
        assert costs.seconds(LOAD, "draft_model", 1, budget) == pytest.approx(expected)


def test_observations_are_shared_out_over_the_rounds_between_them() -> None:
    looking = seconds(observe_kind("recycled"), list(LENS), 5)
    without = StepProfile(CostModel({**PLANTED, observe_kind("recycled"): FREE}))
    added = round_costs().seconds(LOAD, "recycled", 4, 512)
    added -= round_costs(without).seconds(LOAD, "recycled", 4, 512)
    assert added == pytest.approx(looking / CONFIG.speculation.selection.refresh_rounds)


def test_a_chunk_alone_costs_its_prefill_and_beside_decode_rows_only_what_it_adds() -> None:
    costs, products = round_costs(), 8 * 3000.0
    alone = PLANTED[PREFILL].seconds(StepShape(8, 0.0, products, 0))
    assert costs.seconds(RoundLoad((), 8, products), "ngram", 0, 512) == pytest.approx(alone)
    beside = costs.seconds(RoundLoad(LENS, 8, products), "ngram", 0, 512)
    # 11 rows are below the ridge: the weights are read anyway.
    attention = products * PLANTED[PREFILL].per_row_product
    assert beside == pytest.approx(seconds(VERIFY, list(LENS)) + attention)


def test_departures_of_few_rows_count_in_verify_and_draft_steps() -> None:
    curve = StepProfile(PROFILE.model, ((1, 0.0), (3, 0.010), (12, 0.020)))
    plain, bent = round_costs(), round_costs(curve)
    assert bent.seconds(LOAD, "ngram", 0, 512) - plain.seconds(LOAD, "ngram", 0, 512) == (
        pytest.approx(0.010)
    )
    added = bent.seconds(LOAD, "streaming", 3, 512) - plain.seconds(LOAD, "streaming", 3, 512)
    assert added == pytest.approx(3 * 0.010 + 0.020)


def run(costs: ProfiledRoundCosts, batch: Batch, slower: float = 1.0, drafts: float = 1.0) -> None:
    """One step on a machine that is so much slower than profiled, and what it tells the costs."""
    executor = PlantedExecutor(CONFIG, POOL.num_blocks, 9000, packs=False)
    result = executor.execute(batch)
    costs.observe(
        batch,
        replace(
            result,
            draft_seconds=drafts * result.draft_seconds,
            verify_seconds=slower * result.verify_seconds,
        ),
    )


def decode(drafter: str, length: int, context: int = 3000, batch: int = 4) -> Batch:
    probe = Probe(batch, context, drafter=drafter, draft_length=length, draft_budget=512)
    return POOL.batch(probe, range(batch), GREEDY)


def test_costs_follow_a_machine_that_slows_down_kind_by_kind() -> None:
    costs, load = round_costs(), RoundLoad((3000,) * 4)
    verify = seconds(VERIFY, [3000] * 4, 5)
    drafting = costs.seconds(load, "streaming", 4, 512) - verify
    for _ in range(20):
        run(costs, decode("streaming", 4), slower=2.0, drafts=1.5)
    after = costs.seconds(load, "streaming", 4, 512)
    assert after == pytest.approx(2.0 * verify + 1.5 * drafting, rel=0.02)
    assert costs.factors[draft_kind("snapkv")] == 1.0
    assert costs.factors[PREFILL] == 1.0
    assert costs.num_dropped == 0


def test_rounds_without_a_chunk_settle_whether_the_machine_or_its_prefill_is_slower() -> None:
    costs, rows = round_costs(), decode("ngram", 0)
    long = Probe(1, 3000, num_rows=400)
    chunk = POOL.batch(long, [99], GREEDY)
    mixed = Batch((rows.sequences[0], chunk.sequences[0]._replace(block_table=np.arange(60, 120))))
    for _ in range(20):
        run(costs, mixed, slower=1.4)
    beside = RoundLoad((3000,), 400, 400 * 3400.0)
    together = costs.seconds(beside, "ngram", 0, 512)
    for _ in range(20):
        run(costs, rows)
    assert costs.seconds(RoundLoad((3000,) * 4), "ngram", 0, 512) == pytest.approx(
        seconds(VERIFY, [3000] * 4), rel=0.05
    )
    assert costs.factors[PREFILL] > 1.2
    assert costs.seconds(beside, "ngram", 0, 512) == pytest.approx(together, rel=0.1)


def test_rounds_that_observe_are_told_from_those_that_do_not() -> None:
    """A profile that is true stays as it is, through refreshes and prompts that end."""
    costs, executor = round_costs(), PlantedExecutor(CONFIG, 4000, 9000, packs=False)
    measured = 0.0
    num_rounds = 10 * CONFIG.speculation.selection.refresh_rounds
    for _ in range(num_rounds):
        batch = decode("recycled", 3)
        result = executor.execute(batch)
        measured += result.draft_seconds + result.verify_seconds
        costs.observe(batch, result)
    prompt = Probe(1, 3000, num_rows=64, ends_prompt=True, drafter="snapkv", draft_budget=512)
    chunk = POOL.batch(prompt, [9], GREEDY)
    costs.observe(chunk, executor.execute(chunk))
    assert all(factor == pytest.approx(1.0, abs=1e-6) for factor in costs.factors.values())
    predicted = num_rounds * costs.seconds(RoundLoad((3000,) * 4), "recycled", 3, 512)
    assert predicted == pytest.approx(measured, rel=1e-6)


def test_drafts_that_were_not_found_are_no_rows() -> None:
    costs, batch = round_costs(), decode("ngram", 8)
    plain = PlantedExecutor(CONFIG, 4000, 9000, packs=False).execute(decode("ngram", 0))
    for _ in range(10):
        costs.observe(batch, replace(plain, draft_seconds=1e-4))
    assert costs.factors[COMPUTE] == pytest.approx(1.0, rel=0.01)


def test_drafters_that_drafted_together_are_not_told_apart() -> None:
    costs = round_costs()
    own, other = decode("streaming", 2).sequences, decode("snapkv", 2).sequences
    batch = Batch((own[0], other[1]))
    outcome = PlantedExecutor(CONFIG, 4000, 9000).execute(Batch((own[0], own[1])))
    for _ in range(10):
        costs.observe(batch, replace(outcome, draft_seconds=9 * outcome.draft_seconds))
    assert costs.factors[draft_kind("streaming")] == costs.factors[draft_kind("snapkv")] == 1.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0, 1e6])
def test_times_that_cannot_be_are_counted_and_move_nothing(wrong: float) -> None:
    costs, batch = round_costs(), decode("streaming", 4)
    result = PlantedExecutor(CONFIG, 4000, 9000).execute(batch)
    for _ in range(10):
        costs.observe(batch, StepResult(result.sequences, wrong, wrong))
    assert costs.num_dropped == 20
    assert set(costs.factors.values()) == {1.0}


def test_all_settings_of_a_full_batch_are_weighed_in_little_time() -> None:
    """3 drafters x 4 budgets x 16 lengths of 16 sequences, in units of 100 microseconds of other
    work: what else the machine does has no say."""
    costs = round_costs()
    loads = [RoundLoad(tuple(range(1000 + i, 1016 + i))) for i in range(2)]

    def weigh() -> None:
        loads.reverse()
        for drafter in ("streaming", "snapkv", "recycled"):
            for budget in (256, 512, 1024, 2048):
                for length in range(1, 17):
                    costs.seconds(loads[0], drafter, length, budget)

    assert work_units(weigh) < 4.0  # one measured


def test_reading_is_never_more_than_the_step_that_it_is_a_part_of() -> None:
    """Where products of few rows take less than the model says, a slow reading must not make the
    rest of the step, and with slow cores all of it, less than nothing."""
    curve = StepProfile(PROFILE.model, ((1, -10.0), (8, -10.0)))
    costs, load = round_costs(curve), RoundLoad((60_000,) * 2)
    costs.begin_at({COMPUTE: 5.0, READ: 0.5})
    assert all(costs.seconds(load, "streaming", n, 512) > 0.0 for n in range(6))
