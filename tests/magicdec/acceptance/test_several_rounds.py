"""Rounds that drafted alike may be learnt from together: nothing of any row is lost."""

from itertools import chain

import numpy as np
import pytest

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.acceptance.records import Observation

AXES = AcceptanceAxes(("streaming", "recycled"), (256, 512), 8)
CONTEXT, LENGTH, HAZARD = 7000, 5, 0.6


def drawn_rounds(num_rounds: int, num_rows: int) -> list[list[Observation]]:
    """Of requests that are accepted the less, the later they stand."""
    random = np.random.default_rng(7)
    rounds = []
    for _ in range(num_rounds):
        accepted = [
            int(np.argmax([*(random.random(LENGTH) > HAZARD - 0.1 * row), True]))
            for row in range(num_rows)
        ]
        rounds.append(
            [
                Observation("recycled", 512, CONTEXT, LENGTH, count, f"r{row}", LENGTH)
                for row, count in enumerate(accepted)
            ]
        )
    return rounds


def test_rounds_learnt_together_say_what_they_say_one_by_one() -> None:
    """But for when they fade: by at most a round's share."""
    single, together = AcceptanceModel(AXES), AcceptanceModel(AXES)
    rounds = drawn_rounds(40, 4)
    for rows in rounds:
        single.observe_round(rows)
    for begin in range(0, len(rounds), 4):
        together.observe_round(list(chain(*rounds[begin : begin + 4])), 4)
    keys = [f"r{row}" for row in range(4)]
    contexts = [CONTEXT] * 4
    assert together.survival(contexts, keys) == pytest.approx(
        single.survival(contexts, keys), abs=0.08
    )
    expected = {(c.position, c.draft_budget): c for c in single.snapshot().cells}
    for cell in together.snapshot().cells:
        alone = expected[cell.position, cell.draft_budget]
        assert cell.examined == pytest.approx(alone.examined, rel=0.05)
        assert cell.accepted == pytest.approx(alone.accepted, rel=0.05)
    assert [together.num_rounds(key) for key in keys] == [40] * 4


def test_rounds_without_a_draft_count_for_what_they_are() -> None:
    """After some of them the level is not known any more: see _IDLE_ROUNDS."""
    plain = [Observation("recycled", 512, CONTEXT, 0, 0, "r0", 0)]
    single, together = AcceptanceModel(AXES), AcceptanceModel(AXES)
    for model in (single, together):
        for rows in drawn_rounds(20, 1):
            model.observe_round(rows)
    for _ in range(6):
        single.observe_round(plain)
    together.observe_round(plain * 6, 6)
    for model in (single, together):
        model.observe_round(drawn_rounds(1, 1)[0])
    assert together.survival([CONTEXT], ["r0"]) == pytest.approx(
        single.survival([CONTEXT], ["r0"]), abs=1e-9
    )
