"""What the acceptance model does over time: what it forgets, what it keeps, what it hopes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.records import Observation
from tests.magicdec.acceptance.test_model import AXES, CONTEXT, play


def tokens(model: AcceptanceModel, drafter: str = "recycled", length: int = 4) -> float:
    return model.expected_tokens(drafter, 512, CONTEXT, length)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.15), (0.25, 0.9)])
def test_an_abrupt_change_is_believed_within_three_rounds(before: float, after: float) -> None:
    model = AcceptanceModel(AXES)
    play(model, [before] * 4, 200, key="a")
    num_changes = model.num_changes
    play(model, [after] * 4, 3, seed=1, key="b")
    assert model.num_changes == num_changes + 1
    truth = 1.0 + sum(after**j for j in range(1, 5))
    assert tokens(model) == pytest.approx(truth, rel=0.3)


@pytest.mark.parametrize("hazard", [0.2, 0.6, 0.9])
def test_steady_drafts_seldom_look_like_a_change(hazard: float) -> None:
    """Measured over six seeds: none to two false alarms in 1,000 rounds of 8 rows."""
    model = AcceptanceModel(AXES)
    play(model, [hazard] * 4, 1000, seed=7, key="r")
    assert model.num_changes <= 3


def test_one_odd_request_among_eight_is_no_change() -> None:
    model, random = AcceptanceModel(AXES), np.random.default_rng(5)
    play(model, [0.9] * 4, 100, key="r")
    num_changes = model.num_changes
    for _ in range(20):
        accepted = [int((np.cumprod(random.random(4) < 0.9)).sum()) for _ in range(7)]
        rows = [
            Observation("recycled", 512, CONTEXT, 4, count, f"r{i}")
            for i, count in enumerate([*accepted, 0])
        ]
        model.observe_round(rows)
    assert model.num_changes == num_changes
    assert tokens(model) > 3.0
    assert model.expected_tokens("recycled", 512, CONTEXT, 4, "r7") < 1.7


def test_who_is_better_than_whom_outlives_a_change() -> None:
    """Seen side by side in easy text, then only one of them in hard text."""
    model = AcceptanceModel(AXES)
    for i in range(40):
        play(model, [0.9] * 4, 1, seed=i, drafter="recycled")
        play(model, [0.5] * 4, 1, seed=i, drafter="streaming")
    apart = tokens(model) / tokens(model, "streaming")
    play(model, [0.3] * 4, 10, seed=99, drafter="recycled")
    assert apart > 1.5
    assert tokens(model) > 1.05 * tokens(model, "streaming")
    assert tokens(model, "streaming") < 1.5  # never examined in the new text


def test_a_bad_drafter_stays_known_as_bad_while_nothing_is_drafted() -> None:
    model = AcceptanceModel(AXES)
    play(model, [0.05] * 4, 40)
    for _ in range(3000):
        model.observe_round([Observation("recycled", 512, CONTEXT, 0, 0)] * 8)
    assert tokens(model) < 1.25


def test_what_was_seen_fades() -> None:
    """Without a detected change: a slow drift is followed all the same."""
    model = AcceptanceModel(AXES)
    for step in range(40):
        play(model, [0.9 - 0.01 * step] * 4, 20, seed=step)
    truth = 1.0 + sum(0.51**j for j in range(1, 5))
    assert tokens(model) == pytest.approx(truth, rel=0.12)


@given(
    rounds=st.lists(
        st.tuples(st.sampled_from(AXES.drafters), st.integers(0, 8), st.integers(0, 8)),
        max_size=12,
    ),
    context_len=st.integers(1, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_survival_falls_and_hope_lies_between_it_and_certainty(
    rounds: list[tuple[str, int, int]], context_len: int
) -> None:
    model = AcceptanceModel(AXES)
    for drafter, drafted, accepted in rounds:
        counts = (drafted, min(accepted, drafted))
        model.observe_round([Observation(drafter, 512, context_len, *counts, "key")])
    survival = model.survival([context_len, 64], ["key", "other"])
    hopeful = model.survival([context_len, 64], ["key", "other"], hopeful=True)
    assert survival.shape == (2, AXES.num_settings, AXES.max_draft_length)
    assert np.all((survival > 0.0) & (hopeful < 1.0))
    assert np.all(np.diff(survival, axis=2) < 0.0)
    assert np.all(hopeful >= survival)


def test_hope_shrinks_with_what_was_seen() -> None:
    model = AcceptanceModel(AXES)
    setting = AXES.setting("recycled", 512, CONTEXT)

    def room() -> float:
        both = (model.survival([CONTEXT], [], hopeful=hopeful) for hopeful in (True, False))
        hopeful, sober = both
        return float(hopeful[0, setting, 0] - sober[0, setting, 0])

    play(model, [0.5] * 4, 1)
    first = room()
    play(model, [0.5] * 4, 100)
    assert first > 0.1 > 0.03 > room()


def test_requests_beyond_the_capacity_push_out_the_oldest() -> None:
    model = AcceptanceModel(AXES)
    for i in range(600):
        model.observe("recycled", 512, CONTEXT, 4, 4, f"request{i}")
    assert model.num_rounds("request0") == 0
    assert model.num_rounds("request599") == 1
