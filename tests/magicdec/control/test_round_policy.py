"""The policy of a whole engine: the same tokens whatever it chooses, and steps that end in time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from magicdec.batch import Batch, DraftChoice, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import AdaptiveConfig, SpeculativeConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import AdaptivePolicy, DecodeCosts, FixedPolicy
from magicdec.control.step_corrections import COMPUTE
from magicdec.cost_model import VERIFY, CostModel, StepCost, draft_kind
from magicdec.profiling.step_profile import PREFILL, StepProfile, observe_kind
from magicdec.types import SamplingParams, SpeculationParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, token_ids
from tests.magicdec.profiling.planted_executor import GEOMETRY, PLANTED

ADAPTIVE = AdaptiveConfig(("streaming", "recycled", "ngram"), (24, 40), exploration_share=0.2)
CONFIG = SpeculativeConfig(adaptive=AdaptiveConfig())
SAMPLING = SamplingParams(temperature=0.9, seed=5, max_tokens=60, ignore_eos=True)


def cost(fixed: float, per_row: float = 0.0) -> StepCost:
    return StepCost(fixed, 0.0, per_row, 0.0, 0.0, 0.0)


def policy_of(
    adaptive: AdaptiveConfig = ADAPTIVE, config: SpeculativeConfig = CONFIG, *, draft: float = 0.001
) -> AdaptivePolicy:
    """A verify forward of 0.1 s, draft steps of `draft`, 1 ms a row of a prompt."""
    kinds = {draft_kind(name): cost(draft) for name in ("streaming", "recycled", "ngram")}
    kinds |= {VERIFY: cost(0.1), PREFILL: cost(0.0, 0.001), observe_kind("recycled"): cost(0.0)}
    costs = ProfiledRoundCosts(StepProfile(CostModel(kinds)), GEOMETRY, config)
    return AdaptivePolicy(config, adaptive, costs)


def test_an_adaptive_engine_emits_the_plain_tokens(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """Under sampling, through trials, changes of drafter and budget, and requests that wish."""
    prompts = random_prompts([90, 140, 60, 200, 30])
    requests = requests_of(prompts, [replace(SAMPLING, seed=i) for i in range(len(prompts))])
    plain = run(make_engine(engine_config(tiny_model_dir, num_blocks=200)), requests)
    config = engine_config(tiny_model_dir, num_blocks=200)
    engine = make_engine(config)
    policy = policy_of(config=replace(config.speculation, max_view_share=0.5))
    engine.policy = policy
    chosen = set()
    choose: Callable[[RoundLoad], object] = policy.choose

    def watched(load: RoundLoad) -> object:
        plan = choose(load)
        chosen.add((plan.drafter, plan.draft_length))  # type: ignore[attr-defined]
        return plan

    policy.choose = watched  # type: ignore[method-assign,assignment]
    wishes = [SpeculationParams(), SpeculationParams(drafter="ngram", draft_length=3)]
    requests = [replace(r, speculation=wishes[i == 1]) for i, r in enumerate(requests)]
    outputs = run(engine, requests)
    for name, expected in plain.items():
        assert token_ids(outputs[name]) == token_ids(expected)
    assert engine.stats.num_draft_tokens > 0
    assert len({drafter for drafter, length in chosen if length > 0}) > 1, "nothing was tried"
    assert policy.controller.num_dropped == 0


def test_what_cannot_pay_is_not_drafted(tiny_model_dir: Path, make_engine: EngineFactory) -> None:
    engine = make_engine(engine_config(tiny_model_dir))
    engine.policy = policy_of(replace(ADAPTIVE, exploration_share=0.0), draft=0.5)
    run(engine, requests_of(random_prompts([60, 90]), SAMPLING))
    assert engine.stats.num_draft_tokens == 0 and engine.stats.num_rounds > 0


def test_prefill_beside_decode_rows_ends_a_step_about_at_the_target() -> None:
    """0.1 s for the decode rows, 1 ms a prefill row: 0.4 s are 300 rows, to the 32 below."""
    policy = policy_of(replace(ADAPTIVE, inter_token_target_s=0.4, exploration_share=0.0), draft=1)
    load = RoundLoad((2000,), 512, 512 * 3000.0, ("a",), (50,))
    assert policy.choose(load).max_prefill_rows == 288
    assert policy.choose(replace(load, num_prefill_rows=100)).max_prefill_rows == 100
    alone = RoundLoad((), 512, 512 * 3000.0)
    assert policy.choose(alone).max_prefill_rows == 512, "nobody waits for a token"


def test_prompts_get_on_however_short_the_target() -> None:
    policy = policy_of(replace(ADAPTIVE, inter_token_target_s=0.001))
    load = RoundLoad((2000,), 512, 512 * 3000.0, ("a",), (50,))
    assert policy.choose(load).max_prefill_rows == 64


def test_a_prompt_seeds_the_drafter_that_looks_at_it() -> None:
    assert policy_of().choose(RoundLoad((), 100, 1e4)).prompt_drafter == "recycled"
    only = policy_of(AdaptiveConfig(("streaming", "ngram"), (24,)))
    assert only.choose(RoundLoad((), 100, 1e4)).prompt_drafter is None


def test_a_plain_choice_stands_until_it_is_weighed_anew_and_a_drafted_one_but_for_trials() -> None:
    load = RoundLoad((300,) * 2, request_keys=("a", "b"), draft_limits=(8,) * 2)
    policy = policy_of(AdaptiveConfig(("streaming",), (24,), exploration_share=0.0), draft=10.0)
    found = [policy.choose(load) for _ in range(60)]
    assert all(plan.stands is not plan.explores for plan in found if plan.draft_length > 0)
    plain = [plan.stands for plan in found if plan.draft_length == 0 and not plan.explores]
    assert 0.5 <= sum(plain) / len(plain) <= 0.75  # all but the last of four
    assert FixedPolicy.of(replace(CONFIG, draft_length=0)).choose(load).stands
    assert FixedPolicy.of(replace(CONFIG, draft_length=3)).choose(load).stands


def test_decode_rows_cost_what_they_add_to_the_prefill_beside_them() -> None:
    costs = ProfiledRoundCosts(StepProfile(CostModel(PLANTED)), GEOMETRY, CONFIG)
    decode, alone = DecodeCosts(costs), RoundLoad((3000,) * 4)
    beside = replace(alone, num_prefill_rows=400, prefill_products=400 * 2000.0)
    for length in (0, 4):
        added = decode.seconds(beside, "streaming", length, 512)
        whole = costs.seconds(beside, "streaming", length, 512)
        assert added == pytest.approx(whole - costs.prefill_seconds(beside))
        assert 0.0 < added < costs.seconds(alone, "streaming", length, 512)
        assert decode.seconds(alone, "streaming", length, 512) == pytest.approx(
            costs.seconds(alone, "streaming", length, 512)
        )


def step_of(policy: AdaptivePolicy, keys: tuple[str, ...], limits: tuple[int, ...]) -> Batch:
    """The batch that a scheduler makes of the policy's plan; who has limit 0 drafts 5 by itself."""
    plan = policy.choose(RoundLoad((500,) * len(keys), 0, 0.0, keys, limits))
    shares = []
    for i, (key, limit) in enumerate(zip(keys, limits, strict=True)):
        length = plan.draft_length_of(key) if limit else 5
        drafter = plan.drafter if limit else "ngram"
        shares.append(
            ScheduledSequence(
                sequence_id=i,
                token_ids=np.array([1]),
                num_computed_tokens=499,
                block_table=np.arange(70),
                sampling=SAMPLING,
                num_prompt_tokens=400,
                history=None,
                draft=DraftChoice(drafter, length, 24, needs_history=False),
            )
        )
    return Batch(tuple(shares))


def outcome_of(batch: Batch, num_accepted: int) -> StepResult:
    rows = []
    for share in batch.sequences:
        accepted = min(num_accepted, share.draft_length)
        rows.append(SequenceResult((7,) * (accepted + 1), (7,) * share.draft_length))
    return StepResult(tuple(rows), 0.01, 0.1)


def test_what_rounds_show_reaches_others_and_is_taken_from_them() -> None:
    taught, fresh = policy_of(), policy_of()
    before = fresh.controller.acceptance.expected_tokens("recycled", 24, 500, 8)
    for _ in range(60):
        batch = step_of(taught, ("a", "b"), (50, 50))
        taught.observe(batch, outcome_of(batch, num_accepted=0), 0.12)
    snapshot = taught.snapshot()
    assert snapshot.acceptance.cells and snapshot.num_dropped == 0
    assert snapshot.cost_factors[COMPUTE] == pytest.approx(1.0, rel=0.05)
    fresh.merge(replace(snapshot, cost_factors={COMPUTE: 3.0, "unknown": 2.0}))
    assert fresh.controller.acceptance.expected_tokens("recycled", 24, 500, 8) < before
    assert fresh.costs.factors[COMPUTE] == pytest.approx(3.0)
    assert not fresh.snapshot().cost_factors, "nor what they found of its steps"
    assert not fresh.snapshot().acceptance.cells, "others' counts are not handed on as its own"
    batch = step_of(fresh, ("c",), (50,))
    for _ in range(20):
        fresh.observe(batch, outcome_of(batch, 0), 0.12)
    found = fresh.snapshot().cost_factors[COMPUTE]
    fresh.merge(replace(snapshot, cost_factors={COMPUTE: 3.0}))
    assert fresh.snapshot().cost_factors[COMPUTE] == found, "what is seen here counts alone"


def test_a_request_s_own_wish_is_learnt_from_and_is_no_round_of_the_controller() -> None:
    policy = policy_of()
    for _ in range(40):
        batch = step_of(policy, ("wish",), (0,))
        policy.observe(batch, outcome_of(batch, num_accepted=5), 0.12)
    cells = policy.snapshot().acceptance.cells
    assert {cell.drafter for cell in cells} == {"ngram"}
    assert policy.controller.exploration.num_trials == 0
    assert policy.controller.num_dropped == 0


def test_time_around_the_forwards_is_part_of_a_round() -> None:
    """What is spent beside them once a round makes longer drafts worth more."""
    policy = policy_of()
    load = RoundLoad((500,), 0, 0.0, ("a",), (50,))
    before = policy.costs.seconds(load, "recycled", 0, 24)
    for _ in range(60):
        batch = step_of(policy, ("a",), (50,))
        result = outcome_of(batch, num_accepted=1)
        policy.observe(batch, result, result.draft_seconds + result.verify_seconds + 0.05)
    factor = policy.costs.factors[COMPUTE]
    after = policy.costs.seconds(load, "recycled", 0, 24)
    assert after - factor * before == pytest.approx(0.05, rel=0.02)
    for wrong in (float("nan"), float("inf"), -1.0, 1e9):
        policy.costs.overhead.observe(wrong, drafted=False)
    assert policy.costs.seconds(load, "recycled", 0, 24) == after


def test_a_forecast_is_that_of_the_step_that_was_chosen() -> None:
    """Plain decoding of the same rows beside it, and what prompts take of either."""
    policy = policy_of(ADAPTIVE)
    load = RoundLoad((6000,) * 4, request_keys=("a", "b", "c", "d"), draft_limits=(8,) * 4)
    policy.choose(load)
    forecast = policy.forecast()
    assert forecast.seconds == policy.chosen.predicted_seconds
    assert forecast.plain_seconds == pytest.approx(0.1)
    assert forecast.prefill_seconds == 0.0
    assert sum(forecast.bounds.values()) == pytest.approx(0.1)  # all of it is fixed here
    policy.choose(replace(load, num_prefill_rows=100, prefill_products=100.0 * 100))
    beside = policy.forecast()
    assert beside.prefill_seconds == pytest.approx(0.1)
    assert beside.seconds == pytest.approx(0.1 + policy.chosen.predicted_seconds)
    assert beside.plain_seconds == pytest.approx(0.2)


def test_a_forecast_of_prompts_alone_is_their_time() -> None:
    policy = policy_of(ADAPTIVE)
    policy.choose(RoundLoad((), num_prefill_rows=100, prefill_products=100.0 * 100))
    forecast = policy.forecast()
    assert forecast.seconds == forecast.plain_seconds == pytest.approx(0.1)
