"""The script for GPUs runs here at a small size, so that it cannot rot."""

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu import bench_gpu


def test_the_script_runs_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--plot", "--out", str(tmp_path)])
    bench_gpu.main()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["model"] for row in record["steps"]} == {"tiny Llama", "tiny Qwen3"}
    assert all(row["plain_eager_ms"] > 0 and row["draft_ms"] > 0 for row in record["steps"])
    assert all(row["of read bandwidth"] > 0 for row in record["attention"])
    assert (tmp_path / "gpu.png").stat().st_size > 0
