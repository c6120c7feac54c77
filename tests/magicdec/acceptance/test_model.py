"""The acceptance model against worlds whose hazards are known.

Seeds are fixed; a false-alarm rate is the share of seeds under which a right model would fail.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import magicdec.acceptance.model
from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes, Floats
from magicdec.acceptance.records import (
    AcceptanceSnapshot,
    CellCount,
    Observation,
)
from magicdec.config import ConfigError
from tests.magicdec.acceptance.pooling import pool_snapshots

AXES = AcceptanceAxes(("streaming", "recycled", "ngram"), (256, 512, 1024), 8)
CONTEXT = 7000
NAN = math.nan


def draw_accepted(random: np.random.Generator, hazards: list[float]) -> int:
    misses = random.random(len(hazards)) >= hazards
    return int(np.argmax(misses)) if misses.any() else len(hazards)


def play(
    model: AcceptanceModel,
    hazards: list[float],
    num_rounds: int,
    *,
    num_rows: int = 8,
    seed: int = 0,
    drafter: str = "recycled",
    key: str | None = None,
    context_len: int = CONTEXT,
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(num_rounds):
        model.observe_round(
            [
                Observation(
                    drafter,
                    512,
                    context_len,
                    len(hazards),
                    draw_accepted(random, hazards),
                    None if key is None else f"{key}{row}",
                )
                for row in range(num_rows)
            ]
        )


def hazard_errors(model: AcceptanceModel, hazards: list[float]) -> Floats:
    setting = AXES.setting("recycled", 512, CONTEXT)
    survival = model.survival([CONTEXT], [])[0, setting, : len(hazards)]
    found = survival / np.concatenate([[1.0], survival[:-1]])
    return np.asarray(np.abs(found - hazards))


FALLING = [0.9, 0.55, 0.8, 0.6]


def test_hazards_are_those_of_the_positions_that_were_examined() -> None:
    """Four deviations of the last ~90 rounds' counts: one seed in 4,000 fails for each position."""
    model = AcceptanceModel(AXES)
    play(model, FALLING, 600)
    num_examined = 8 * 92 * np.cumprod([1.0, *FALLING[:-1]])
    deviations = np.sqrt(np.multiply(FALLING, np.subtract(1.0, FALLING)) / num_examined)
    assert np.all(hazard_errors(model, FALLING) < 4 * deviations + 16 * 0.3 / num_examined)


def test_counting_censored_positions_as_rejected_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bias planted, on the same draws: the bound of the test above does not hold."""

    def biased(rows: list[Observation], num_positions: int) -> tuple[Floats, Floats]:
        positions = np.arange(num_positions)
        drafted = np.array([[row.num_draft_tokens] for row in rows])
        accepted = np.array([[row.num_accepted_tokens] for row in rows])
        return (positions < drafted).astype(float), (positions < accepted).astype(float)

    monkeypatch.setattr(magicdec.acceptance.model, "judged", biased)
    model = AcceptanceModel(AXES)
    play(model, FALLING, 600)
    assert hazard_errors(model, FALLING)[1:].min() > 0.04
    assert hazard_errors(model, FALLING)[3] > 0.15


def test_expected_tokens_is_the_sum_of_survivals() -> None:
    model = AcceptanceModel(AXES)
    play(model, [0.9, 0.5], 50)
    survival = model.survival([CONTEXT], [])[0, AXES.setting("recycled", 512, CONTEXT)]
    for length in range(9):
        expected = model.expected_tokens("recycled", 512, CONTEXT, length)
        assert expected == pytest.approx(1.0 + survival[:length].sum())


def test_an_unseen_cell_follows_its_relatives() -> None:
    """Bad drafts at 512 positions lower the other budgets, contexts, positions and drafters, those
    in common with them the more."""
    model, fresh = AcceptanceModel(AXES), AcceptanceModel(AXES)
    play(model, [0.3, 0.3], 60)
    for budget in AXES.draft_budgets:
        assert model.expected_tokens("recycled", budget, 3000, 6) < 2.3
        assert fresh.expected_tokens("recycled", budget, 3000, 6) > 4.0
    other = model.expected_tokens("streaming", 512, CONTEXT, 6)
    same = model.expected_tokens("recycled", 1024, CONTEXT, 6)
    lost = fresh.expected_tokens("streaming", 512, CONTEXT, 6) - other
    assert 0.0 < lost < fresh.expected_tokens("recycled", 1024, CONTEXT, 6) - same


@pytest.mark.parametrize("drafter, hazards", [("ngram", [0.01]), ("recycled", [0.2] * 4)])
def test_a_family_of_drafters_says_nothing_of_another(drafter: str, hazards: list[float]) -> None:
    """Whatever becomes of n-gram lookup, views are as good as they were, and the other way round;
    for the requests that it was tried on, too."""
    model, fresh = AcceptanceModel(AXES), AcceptanceModel(AXES)
    play(model, hazards, 20, drafter=drafter, key="r")
    for other in set(AXES.drafters) - {drafter}:
        expected = [m.expected_tokens(other, 512, CONTEXT, 6, "r0") for m in (model, fresh)]
        apart = (other == "ngram") != (drafter == "ngram")
        assert (expected[0] == pytest.approx(expected[1])) == apart


def test_a_request_has_its_own_offset_and_strangers_have_none() -> None:
    model = AcceptanceModel(AXES)
    random = np.random.default_rng(3)
    rows = {"good": [0.95] * 4, "bad": [0.3] * 4}
    for _ in range(12):
        model.observe_round(
            [
                Observation("recycled", 512, CONTEXT, 4, draw_accepted(random, hazards), key)
                for key, hazards in rows.items()
                for key in ([key] if key == "bad" else [f"{key}{i}" for i in range(3)])
            ]
        )
    tokens = {
        key: model.expected_tokens("recycled", 512, CONTEXT, 4, key)
        for key in ("good0", "bad", "stranger")
    }
    assert tokens["bad"] < 2.2 < tokens["stranger"] < tokens["good0"]
    assert tokens["good0"] > 3.9
    assert tokens["stranger"] == model.expected_tokens("recycled", 512, CONTEXT, 4)
    assert model.expected_tokens("streaming", 256, CONTEXT, 4, "bad") < 2.2  # whoever drafts


def test_a_drafter_that_proposes_less_than_asked_failed_there() -> None:
    asked, unknown = AcceptanceModel(AXES), AcceptanceModel(AXES)
    short = Observation("ngram", 256, CONTEXT, 1, 1, draft_length=4)
    none = Observation("ngram", 256, CONTEXT, 0, 0, draft_length=4)
    for _ in range(30):
        asked.observe_round([short, none])
        unknown.observe_round([short._replace(draft_length=None), none._replace(draft_length=None)])
    survival = asked.survival([CONTEXT], [])[0, AXES.setting("ngram", 256, CONTEXT)]
    assert survival[0] == pytest.approx(0.5, abs=0.1)
    assert survival[1] < 0.15
    assert unknown.expected_tokens("ngram", 256, CONTEXT, 1) > 1.8  # all that it proposed was right


ABSURD = [
    Observation("recycled", 512, CONTEXT, 4, 5),
    Observation("recycled", 512, CONTEXT, -1, 0),
    Observation("recycled", 512, CONTEXT, 4, -1),
    Observation("recycled", 512, CONTEXT, 400, 4),
    Observation("recycled", 512, CONTEXT, 4, NAN),  # type: ignore[arg-type]
    Observation("recycled", 512, CONTEXT, NAN, 0),  # type: ignore[arg-type]
    Observation("recycled", 512, CONTEXT, 4, 2.5),  # type: ignore[arg-type]
    Observation("recycled", 512, NAN, 4, 2),  # type: ignore[arg-type]
    Observation("recycled", 512, 0, 4, 2),
    Observation("recycled", NAN, CONTEXT, 4, 2),
    Observation("recycled", -512, CONTEXT, 4, 2),
    Observation("recycled", 512, CONTEXT, 4, 2, draft_length=3),
    Observation("top_k", 512, CONTEXT, 4, 2),
]


@pytest.mark.parametrize("row", ABSURD, ids=repr)
def test_what_cannot_be_is_counted_and_moves_nothing(row: Observation) -> None:
    model = AcceptanceModel(AXES)
    play(model, [0.8, 0.7], 20)
    before, snapshot = model.survival([CONTEXT], []), model.snapshot()
    model.observe_round([row] * 3)
    if row.draft_length is None:
        model.observe(
            row.drafter,
            row.draft_budget,
            row.context_len,
            row.num_draft_tokens,
            row.num_accepted_tokens,
        )
    assert model.num_dropped == 3 + (row.draft_length is None)
    assert np.array_equal(model.survival([CONTEXT], []), before)
    assert model.snapshot() == snapshot


Rounds = list[list[tuple[str, int, int, int]]]
row_of_a_round = st.tuples(
    st.sampled_from(AXES.drafters),
    st.sampled_from((256, 512, 1024)),
    st.integers(100, 100_000),
    st.integers(1, 8),
)


@given(
    rounds=st.lists(st.lists(row_of_a_round, min_size=2, max_size=4), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_merged_snapshots_equal_having_seen_it_all(rounds: Rounds, seed: int) -> None:
    random = np.random.default_rng(seed)
    whole, halves = AcceptanceModel(AXES), [AcceptanceModel(AXES) for _ in range(2)]
    for rows in rounds:
        seen = [
            Observation(drafter, budget, context_len, length, int(random.integers(0, length + 1)))
            for drafter, budget, context_len, length in rows
        ]
        whole.observe_round(seen)
        for half, share in zip(halves, (seen[:1], seen[1:]), strict=True):
            half.observe_round(share)
    pooled = pool_snapshots(half.snapshot() for half in halves)
    expected, found = AcceptanceModel(AXES), AcceptanceModel(AXES)
    expected.merge(whole.snapshot())
    found.merge(pooled)
    contexts = [300, CONTEXT, 60_000]
    assert np.allclose(found.survival(contexts, []), expected.survival(contexts, []))
    assert found.snapshot() == AcceptanceModel(AXES).snapshot()  # merged counts are not handed on
    found.merge(pooled)  # in place of the last ones, not beside them
    assert np.allclose(found.survival(contexts, []), expected.survival(contexts, []), atol=5e-3)


def test_a_new_replica_starts_with_what_the_cluster_knows() -> None:
    veteran, newcomer = AcceptanceModel(AXES), AcceptanceModel(AXES)
    play(veteran, [0.4, 0.4, 0.4], 100)
    newcomer.merge(veteran.snapshot())
    known = veteran.expected_tokens("recycled", 512, CONTEXT, 3)
    assert newcomer.expected_tokens("recycled", 512, CONTEXT, 3) == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize(
    "counts",
    [(NAN, 1.0), (5.0, NAN), (5.0, 6.0), (-1.0, -1.0), (math.inf, 1.0)],
    ids=str,
)
def test_absurd_statistics_of_a_replica_are_dropped(counts: tuple[float, float]) -> None:
    model = AcceptanceModel(AXES)
    bad = AcceptanceSnapshot((CellCount("recycled", 512, 6, 1, *counts),))
    before = model.survival([CONTEXT], [])
    model.merge(bad)
    assert np.allclose(model.survival([CONTEXT], []), before) and model.num_dropped == 1
    good = AcceptanceSnapshot((CellCount("recycled", 512, 6, 1, 5.0, 4.0),))
    assert pool_snapshots([bad, good, good]).cells == (CellCount("recycled", 512, 6, 1, 10.0, 8.0),)


def test_axes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="drafters must be one or more of"):
        AcceptanceAxes(("oracle",), (512,))
    with pytest.raises(ConfigError, match="draft_budgets must ascend"):
        AcceptanceAxes(("recycled",), (512, 256))
    with pytest.raises(ConfigError, match="max_draft_length must be at most 16, got 17"):
        AcceptanceAxes(("recycled",), (512,), 17)
