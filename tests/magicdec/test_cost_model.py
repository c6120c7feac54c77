"""Equations, step times, their fit and their live correction, each against what defines it."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.cost_model import (
    VERIFY,
    CostModel,
    StepCost,
    StepShape,
    best_draft_length,
    draft_kind,
    expected_tokens,
    fit_step_cost,
    implied_acceptance,
    speedup,
)

KV_BYTES = 131072.0  # a token
COST = StepCost(1e-3, 5e-3, 6e-5, 4e-13, 9e-10, 4e-5)

probability = st.floats(0.0, 1.0)
unit = st.floats(0.0, 1e-3)
costs = st.builds(StepCost, unit, unit, unit, unit, unit, unit)
shapes = st.builds(
    StepShape,
    st.integers(0, 4096),
    st.floats(0.0, 1e12),
    st.floats(0.0, 1e9),
    st.integers(0, 512),
)


def decode_shape(batch: int, context: int, rows: int) -> StepShape:
    return StepShape(batch * rows, batch * context * KV_BYTES, float(batch * rows * context), batch)


# Both sides of the ridge of every cost planted below, and contexts that tell KV from sequences.
GRID = [
    decode_shape(batch, context, rows)
    for batch in (1, 2, 4, 8, 16, 32, 64)
    for context in (512, 4096, 32768)
    for rows in (1, 3, 5, 9)
]


def planted(seed: int) -> tuple[StepCost, StepCost]:
    """A cost, and a prior whose coefficients are up to 4.5 times too great or too small."""
    rng = np.random.default_rng(seed)
    true = np.array(astuple(COST)) * np.exp(rng.uniform(-1.0, 1.0, 6))
    prior = true * np.exp(rng.uniform(-1.5, 1.5, 6))
    return StepCost(*true.tolist()), StepCost(*prior.tolist())


def times(cost: StepCost, seed: int, noise: float) -> list[float]:
    rng = np.random.default_rng(seed + 1000)
    return [cost.seconds(s) * math.exp(rng.normal(0.0, noise)) for s in GRID]


def worst_error(fitted: StepCost, true: StepCost) -> float:
    return max(abs(fitted.seconds(s) / true.seconds(s) - 1.0) for s in GRID)


@given(probability, st.integers(0, 32))
def test_expected_tokens_is_the_sum_over_positions(acceptance: float, draft_length: int) -> None:
    total = sum(acceptance**i for i in range(draft_length + 1))
    assert expected_tokens(acceptance, draft_length) == pytest.approx(total, rel=1e-6)


@given(st.floats(0.0, 0.999), st.integers(1, 16))
def test_implied_acceptance_inverts_expected_tokens(acceptance: float, draft_length: int) -> None:
    tokens = expected_tokens(acceptance, draft_length)
    assert implied_acceptance(tokens, draft_length) == pytest.approx(acceptance, abs=1e-6)


@pytest.mark.parametrize(("tokens", "length"), [(0.9, 3), (4.1, 3), (math.nan, 3), (1.0, 0)])
def test_implied_acceptance_refuses_what_no_acceptance_yields(tokens: float, length: int) -> None:
    with pytest.raises(ValueError, match=f"tokens_per_round .* got {tokens} at draft_length"):
        implied_acceptance(tokens, length)


@given(st.floats(0.0, 0.99), st.floats(0.01, 2.0), st.floats(0.0, 0.2))
def test_best_draft_length_beats_every_other(
    acceptance: float, draft_ratio: float, slope: float
) -> None:
    verify = [1.0 + slope * n for n in range(17)]
    best = best_draft_length(acceptance, draft_ratio, verify)

    def gain(n: int) -> float:
        return speedup(expected_tokens(acceptance, n), n, draft_ratio, verify[n])

    assert all(gain(best) >= gain(n) - 1e-12 for n in range(17))


def test_no_draft_is_best_where_drafts_cost_what_they_save() -> None:
    assert best_draft_length(0.9, 1.0, [1.0] * 17) == 0
    assert best_draft_length(0.0, 1e-9, [1.0] * 17) == 0


# Best speedup and draft length where KV dominates: c is the share of the KV that is read, v = 1.1.
ASYMPTOTES = {
    0.05: "2.48@7 2.89@8 3.47@10 4.41@14 5.34@18 6.30@22",
    0.10: "2.06@5 2.32@6 2.70@8 3.27@10 3.80@13 4.31@16",
    0.20: "1.61@3 1.77@4 1.98@5 2.28@7 2.54@9 2.79@11",
    0.30: "1.37@3 1.48@3 1.61@4 1.80@5 1.97@7 2.11@8",
    0.50: "1.10@2 1.16@2 1.23@3 1.32@3 1.40@4 1.47@5",
}


@pytest.mark.parametrize("share", ASYMPTOTES)
def test_best_length_and_speedup_where_kv_dominates(share: float) -> None:
    found = []
    for acceptance in (0.75, 0.80, 0.85, 0.90, 0.93, 0.95):
        best = best_draft_length(acceptance, share, [1.0] + [1.1] * 40)
        found.append(f"{speedup(expected_tokens(acceptance, best), best, share, 1.1):.2f}@{best}")
    assert " ".join(found) == ASYMPTOTES[share]


@given(costs, shapes, st.sampled_from(StepShape.__slots__), st.integers(1, 10**6))
def test_seconds_never_fall_as_a_feature_grows(
    cost: StepCost, shape: StepShape, feature: str, more: int
) -> None:
    values = dict(zip(StepShape.__slots__, astuple(shape), strict=True))
    assert cost.seconds(replace(shape, **{feature: values[feature] + more})) >= cost.seconds(shape)


def test_rows_are_free_up_to_the_ridge_and_linear_beyond() -> None:
    cost = StepCost(0.0, 1e-3, 1e-5, 0.0, 0.0, 0.0)
    assert cost.seconds(StepShape(1, 0, 0, 1)) == cost.seconds(StepShape(100, 0, 0, 1)) == 1e-3
    assert cost.seconds(StepShape(300, 0, 0, 1)) == pytest.approx(3e-3)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_cost_that_cannot_be_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=f"StepCost.per_row must be .* got {value}"):
        replace(COST, per_row=value)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_fit_recovers_planted_times_under_noise(seed: int) -> None:
    """Of 1,500 seeds the worst reaches 0.6 of each bound. fixed and weights lie close together."""
    true, prior = planted(seed)
    fitted = fit_step_cost(GRID, times(true, seed, 0.03), prior)
    assert worst_error(fitted, true) < 0.15
    assert fitted.per_kv_byte == pytest.approx(true.per_kv_byte, rel=0.15)
    assert fitted.fixed + fitted.weights == pytest.approx(true.fixed + true.weights, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_fit_of_exact_times_reproduces_them(seed: int) -> None:
    true, prior = planted(seed)
    assert worst_error(fit_step_cost(GRID, times(true, seed, 0.0), prior), true) < 0.06


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_not_bent_by_outliers(seed: int) -> None:
    """One step in ten stalled, or was cut short by a clock's error."""
    true, prior = planted(seed)
    measured = times(true, seed, 0.02)
    for i in range(seed, len(measured), 10):
        measured[i] *= 5.0 if i % 20 < 10 else 0.2
    assert worst_error(fit_step_cost(GRID, measured, prior), true) < 0.08


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_prior_wrong_by_orders_of_magnitude_does_not_bend_a_covered_fit(factor: float) -> None:
    true, _ = planted(0)
    prior = StepCost(*(value * factor for value in astuple(true)))
    assert worst_error(fit_step_cost(GRID, times(true, 0, 0.02), prior), true) < 0.08


def test_fit_leaves_out_times_that_cannot_be() -> None:
    true, prior = planted(3)
    measured = times(true, 3, 0.02)
    bad = [math.nan, math.inf, -math.inf, -1.0, 0.0]
    assert fit_step_cost([*GRID, *GRID[:5]], [*measured, *bad], prior) == fit_step_cost(
        GRID, measured, prior
    )
    assert fit_step_cost(GRID[:5], bad, prior) == prior
    with pytest.raises(ValueError, match="shorter"):
        fit_step_cost(GRID, measured[:-1], prior)


def test_what_the_shapes_do_not_hold_stays_with_the_prior() -> None:
    true = StepCost(1e-3, 5e-3, 5e-5, 4e-13, 9e-10, 0.0)
    without_kv = [StepShape(n, 0.0, 0.0, n) for n in (1, 2, 4, 8, 16)]  # below the ridge at 100
    fitted = fit_step_cost(without_kv, [true.seconds(s) for s in without_kv], true)
    assert fitted.per_kv_byte == true.per_kv_byte
    assert fitted.per_row_product == true.per_row_product
    assert fitted.per_row == pytest.approx(true.per_row, rel=0.01)
    assert fitted.seconds(decode_shape(64, 4096, 5)) == pytest.approx(
        true.seconds(decode_shape(64, 4096, 5)), rel=0.02
    )


def test_cost_model_names_the_kinds_it_knows() -> None:
    model = CostModel({VERIFY: COST, draft_kind("ngram"): replace(COST, weights=0.0)})
    shape = decode_shape(4, 1024, 1)
    assert model.seconds(VERIFY, shape) == COST.seconds(shape)
    assert model.seconds("draft:ngram", shape) < COST.seconds(shape)
    with pytest.raises(KeyError, match="no cost of 'draft:snapkv'; known are draft:ngram, verify"):
        model.cost("draft:snapkv")
