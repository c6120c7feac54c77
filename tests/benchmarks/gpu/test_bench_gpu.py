"""The script for GPUs runs here at a small size, so that it cannot rot."""

import json
from pathlib import Path

from tests.benchmarks.gpu import bench_gpu


def test_the_script_runs_at_a_small_size(tmp_path: Path, tiny_model_dir: Path) -> None:
    bench_gpu.main(["--tiny", "--plot", "--model", str(tiny_model_dir), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["model"] for row in record["steps"]} == {"tiny Llama", "tiny Qwen3"}
    assert all(row["plain_eager_ms"] > 0 and row["draft_ms"] > 0 for row in record["steps"])
    assert all(0 < row["plain_round_ms"] < row["drafted_round_ms"] for row in record["steps"])
    assert all(row["of read bandwidth"] > 0 for row in record["attention"])
    assert all(row["top-k, us"] > 0 and row["kernel, us"] > 0 for row in record["choices"])
    (row,) = record["end to end"]
    assert (row["batch"], row["context"]) == (2, 300)
    assert row["plain_tokens_s"] > 0 and row["drafted_tokens_s"] > 0
    assert 0.0 <= row["accepted"] <= 1.0
    assert (tmp_path / "gpu.png").stat().st_size > 0
