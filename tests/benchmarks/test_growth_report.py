"""What a growth run prints and draws, a point that was not run among the others."""

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.growth_report import draw, render

GIB = 1 << 30


def point(batch: int, context: int, rate: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "context": context,
        "plain": rate,
        "adaptive": 1.5 * rate,
        "ratio": 1.5,
        "lowest": 1.4,
        "highest": 1.6,
        "held_bytes": 5 * GIB,
        "unused_kv_bytes": 2 * GIB,
    }


def test_points_stand_by_batch_and_context_and_memory_leaves_out_unused_blocks(
    tmp_path: Path,
) -> None:
    run = {"run": {"model": "tiny", "batch": 1}}
    records = [run, point(1, 512, 10.0), point(1, 7000, 4.0), point(8, 512, 40.0)]
    table = render(records)
    assert "| batch 1 | 10, 15; 1.50 [1.40 .. 1.60] | 4, 6; 1.50 [1.40 .. 1.60] |" in table
    assert "| batch 8 | 40, 60; 1.50 [1.40 .. 1.60] | not run |" in table
    assert "| batch 1 | 3.0 | 3.0 |" in table
    draw(records, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_a_run_without_a_point_says_so() -> None:
    with pytest.raises(ValueError, match="no point was measured"):
        render([{"run": {"model": "tiny"}}])
