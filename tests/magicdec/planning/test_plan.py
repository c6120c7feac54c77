"""A plan's rates, shares and turning points, and what it refuses."""

import math
from dataclasses import astuple, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.config import ConfigError
from magicdec.planning.acceptance import default_acceptance
from magicdec.planning.devices import DATA_SHEETS, known_device
from magicdec.planning.plan import Plan, draft_settings
from magicdec.planning.rounds import DraftSetting
from magicdec.roofline import context_where_kv_overtakes, critical_context
from tests.magicdec.planning.plans import LLAMA_31_8B, LLAMA_32_1B, request

FOREIGN = replace(LLAMA_32_1B, geometry=replace(LLAMA_32_1B.geometry, vocab_size=49152))
BATCHES = st.integers(1, 64)
CONTEXTS = st.integers(256, 131072)


def fitting(plan: Plan, batch_size: int, context_len: int) -> int:
    """The context, cut to what fits."""
    return max(min(context_len, plan.memory.max_context(batch_size)), 1)


@given(BATCHES, CONTEXTS, st.floats(1.0, 3.0))
def test_more_bandwidth_and_arithmetic_are_never_slower(
    batch_size: int, context_len: int, factor: float
) -> None:
    slow = Plan(request())
    context = fitting(slow, batch_size, context_len)
    device = slow.request.device
    for faster in (
        replace(device, bandwidth=factor * device.bandwidth),
        replace(device, arithmetic=factor * device.arithmetic),
    ):
        fast = Plan(request(device=faster))
        before, after = slow.point(batch_size, context), fast.point(batch_size, context)
        assert before.plain_tokens_per_second is not None and before.draft is not None
        assert after.plain_tokens_per_second is not None and after.draft is not None
        assert after.plain_tokens_per_second >= before.plain_tokens_per_second * (1 - 1e-9)
        assert after.draft.tokens_per_second >= before.draft.tokens_per_second * (1 - 1e-9)


@given(BATCHES, CONTEXTS)
def test_a_draft_is_never_planned_to_lose_and_shares_are_whole(
    batch_size: int, context_len: int
) -> None:
    plan = Plan(request())
    point = plan.point(batch_size, fitting(plan, batch_size, context_len))
    assert point.speedup is not None and point.speedup >= 1.0
    assert point.shares is not None and sum(astuple(point.shares)) == pytest.approx(1.0)
    assert point.draft is not None
    assert (point.draft.draft_length == 0) == (point.draft.drafter is None)


@given(BATCHES, st.integers(1536, 60000))
def test_gain_and_kv_share_grow_with_the_context(batch_size: int, context_len: int) -> None:
    plan = Plan(request(settings=draft_settings(["recycled"], [512], [0.85])))
    longer = fitting(plan, batch_size, 2 * context_len)
    short, long = plan.point(batch_size, longer // 2), plan.point(batch_size, longer)
    assert short.shares is not None and long.shares is not None
    assert long.shares.kv > short.shares.kv
    assert short.speedup is not None and long.speedup is not None
    assert long.speedup >= short.speedup - 1e-9


def test_what_does_not_fit_has_no_rates() -> None:
    point = Plan(request()).point(64, 131072)
    assert point.kv_share is not None and point.kv_share > 1.0
    assert point.plain_tokens_per_second is None and point.speedup is None


def test_points_come_batch_by_batch() -> None:
    found = [(p.batch_size, p.context_len) for p in Plan(request()).points()]
    assert found == [(1, 2048), (1, 32768), (8, 2048), (8, 32768)]


@pytest.mark.parametrize("batch_size", [1, 8, 128])
def test_kv_overtakes_weights_where_their_shares_are_equal(batch_size: int) -> None:
    plan = Plan(request())
    crossing = plan.kv_overtakes(batch_size)
    assert crossing == pytest.approx(context_where_kv_overtakes(LLAMA_31_8B.geometry, batch_size))
    shares = plan.rounds.shares(batch_size, round(crossing))
    assert shares.kv == pytest.approx(shares.weights, rel=0.002)


def test_a_rank_without_kv_heads_does_not_speed_the_fullest_up() -> None:
    """16 ranks read a sixteenth of the weights each, and an eighth of the KV."""
    assert Plan(request(num_ranks=16)).kv_overtakes(1) == pytest.approx(
        Plan(request(num_ranks=8)).kv_overtakes(1) / 2
    )


def test_the_critical_length_is_the_least_of_the_closed_form() -> None:
    plan = Plan(request(settings=draft_settings(["streaming"], [512, 2048], [0.8])))
    found = plan.critical()
    assert found is not None
    rates = plan.request.device.rates(32, 1)
    expected = min(
        critical_context(
            LLAMA_31_8B.geometry, rates, acceptance=0.8, draft_length=n, draft_budget=budget
        )
        for n in range(1, 17)
        for budget in (512, 2048)
    )
    assert found.context_len == pytest.approx(expected)
    assert found.setting.draft_budget == 512


def test_gain_grows_with_the_batch_beyond_the_critical_length_alone() -> None:
    """Of data without attention's arithmetic, which the closed form leaves out: rates tell."""
    huge = replace(known_device("h100", "bfloat16"), usable_bytes=1e15)
    settings = draft_settings(["streaming"], [512], [0.8])
    plan = Plan(request(device=huge, settings=settings, batch_sizes=(1,)))
    critical = plan.critical()
    assert critical is not None
    above = [plan.point(b, round(2 * critical.context_len)).speedup for b in (8, 64, 512, 4096)]
    assert above == sorted(above, key=lambda gain: gain or 0.0) and (above[-1] or 0.0) > 1.05
    assert plan.point(4096, round(0.7 * critical.context_len)).speedup == 1.0


def test_nothing_is_critical_where_nobody_reads_a_view_or_nothing_is_accepted() -> None:
    assert Plan(request(settings=draft_settings(["ngram"], [512], []))).critical() is None
    none = Plan(request(settings=draft_settings(["streaming"], [512], [0.0]))).critical()
    assert none is not None and math.isinf(none.context_len)


def test_no_view_larger_than_the_engine_would_read_is_planned() -> None:
    plan = Plan(request(settings=draft_settings(["streaming"], [2048], [1.0])))
    assert not plan.rounds.may_draft(DraftSetting("streaming", 2048), 6000)
    assert plan.rounds.may_draft(DraftSetting("streaming", 2048), 6144)
    assert plan.rounds.may_draft(DraftSetting("ngram", 2048), 10)


def test_recycled_pays_for_looking_and_streaming_does_not() -> None:
    gains = [
        Plan(request(settings=draft_settings([name], [512], [0.85]))).point(8, 32768).speedup or 0
        for name in ("recycled", "snapkv", "streaming")
    ]
    assert gains[0] < gains[1] == gains[2]


def test_a_lookup_costs_nothing_and_a_small_model_its_own_step() -> None:
    rounds = Plan(request(draft_model=LLAMA_32_1B)).rounds
    assert rounds.draft_seconds(DraftSetting("ngram", 512), 8, 32768) == 0.0
    small = rounds.draft_seconds(DraftSetting("draft_model", 512), 8, 32768)
    assert 0.0 < small < 0.3 * rounds.draft_seconds(DraftSetting("streaming", 512), 8, 32768)


def test_a_device_reaches_less_than_its_data_sheet_says() -> None:
    for name, sheet in DATA_SHEETS.items():
        device = known_device(name, "bfloat16")
        assert device.bandwidth == pytest.approx(0.8 * sheet.bandwidth)
        assert device.arithmetic == pytest.approx(0.6 * sheet.tensor_flops)
        assert known_device(name, "float32").arithmetic < device.arithmetic
        assert device.fixed_seconds(32, 2) > device.fixed_seconds(32, 1) == pytest.approx(960e-6)


@given(st.sampled_from(["streaming", "snapkv", "recycled"]), st.integers(96, 4096), CONTEXTS)
def test_expected_acceptance_grows_with_the_budget_and_falls_with_the_context(
    drafter: str, budget: int, context_len: int
) -> None:
    found = default_acceptance(drafter, budget, context_len)
    assert 0.0 < found < default_acceptance(drafter, 2 * budget, context_len) < 1.0
    assert found > default_acceptance(drafter, budget, 2 * context_len)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ranks": 64}, "between 1 and 32 .* got 64; 1, 2, 4, 8 split the 8 KV heads evenly"),
        ({"num_ranks": 0}, "tensor_parallel_size must be between 1 and 32"),
        ({"batch_sizes": (0,)}, "batch must be at least 1, got 0"),
        ({"batch_sizes": ()}, "batch must name at least one number"),
        ({"context_lens": (8, 200000)}, "max_position_embeddings.* at most 131072, got 200000"),
        ({"max_draft_length": 17}, "max_draft_length must be at most 16, got 17"),
        ({"settings": (DraftSetting("streaming", 50),)}, "budget must be at least 96, got 50"),
        ({"settings": (DraftSetting("draft_model", 512),)}, "draft_model needs draft_model"),
        (
            {"draft_model": replace(LLAMA_32_1B, max_context=8192)},
            "draft model's max_position_embeddings.* at most 8192, got 32768",
        ),
        ({"draft_model": FOREIGN}, "vocabulary of 128,256 tokens, got 49,152"),
        ({"settings": (DraftSetting("ngram", 512, math.nan),)}, "acceptance must be .* got nan"),
    ],
)
def test_impossible_requests_name_field_value_and_limit(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        request(**changes)


def test_settings_pair_acceptances_with_budgets() -> None:
    found = draft_settings(["streaming", "ngram"], [512, 1024], [0.8, 0.9])
    pairs = [(s.drafter, s.draft_budget, s.acceptance) for s in found]
    assert pairs == [("streaming", 512, 0.8), ("streaming", 1024, 0.9), ("ngram", 512, 0.8)]
    with pytest.raises(ConfigError, match=r"one number or one a budget \(2\), got 3"):
        draft_settings(["streaming"], [512, 1024], [0.8, 0.9, 0.9])
    with pytest.raises(ConfigError, match=r"drafter must be one of .* got 'top_k'"):
        draft_settings(["top_k"], [512], [])
