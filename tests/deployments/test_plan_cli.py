"""`magicdec plan` as a person and a program see it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from magicdec.deployments.cli import app
from magicdec.deployments.plan_table import points_table
from magicdec.planning.figures import DraftFigures, PointFigures

RUNNER = CliRunner()
FIGURES = ["--bandwidth", "2680", "--flops", "594", "--memory", "72"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama-3.1-8B's shape, without weights."""
    folder = tmp_path_factory.mktemp("plan") / "llama-3.1-8b"
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ).save_pretrained(folder)
    return str(folder / "config.json")


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_help_says_what_it_takes() -> None:
    text = run("--help")
    assert "--gpu" in text and "--acceptance" in text and "docs/planning.md" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_report_fits_the_terminal_and_says_all(
    config_file: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    drafters = ["--drafter", "recycled,ngram"]
    text = run(config_file, "--gpu", "h100", "--context", "2048,32k,128k", *drafters)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert "…" not in text, "a column was cut"
    assert lines[0] == "llama-3.1-8b on h100, bfloat16"
    words = " ".join(text.split())
    assert "15.0 GB of weights and 128 KiB of KV a token" in words
    assert "80%, 60% and 90% of the data sheet" in words
    assert "KV pool 426,788 tokens; sequences at once: 208 of 2,048, 13 of 32,768" in words
    assert "114,512 (batch 1), 14,314 (batch 8)" in words
    assert "critical" in words and "expected from published figures" in words
    rows = [line.split() for line in lines if line.split()[:2] == ["8", "32,768"]]
    assert rows[0][2:5] == ["62%", "408", "650"] and "recycled" in rows[0]
    full = [line.split() for line in lines if line.split()[:2] == ["128", "131,072"]]
    assert full[0][2:] == ["no", *["-"] * 10]


def test_json_says_the_same_as_the_table(config_file: str) -> None:
    found = document(config_file, "--gpu", "h100", "--batch", "8", "--context", "32k,128k")
    fits, full = found["points"]
    assert (fits["batch_size"], fits["context_len"]) == (8, 32768)
    assert fits["plain_tokens_per_second"] == pytest.approx(408, abs=1)
    assert fits["speedup"] == pytest.approx(1.59, abs=0.01)
    assert fits["draft"]["drafter"] == "recycled"
    assert sum(fits["shares"].values()) == pytest.approx(1.0)
    assert full["plain_tokens_per_second"] is None and full["kv_share"] > 1.0
    assert found["kv_pool"]["tokens"] == 426788
    assert found["kv_overtakes_weights"] == {"8": pytest.approx(14314)}
    assert found["critical"]["context_len"] > 0
    assert found["model"]["max_context"] == 131072


def test_a_folder_its_file_and_figures_like_the_tables_agree(config_file: str) -> None:
    options = ["--batch", "4", "--context", "8k"]
    points = [
        document(model, *device, *options)["points"][0]["plain_tokens_per_second"]
        for model in (config_file, str(Path(config_file).parent))
        for device in (["--gpu", "h100"], FIGURES)
    ]
    assert points == pytest.approx([points[0]] * 4, rel=1e-3)


def test_given_figures_win_over_the_table(config_file: str) -> None:
    options = ["--gpu", "h100", "--batch", "1", "--context", "2k"]
    plain, slower, loaded = (
        document(config_file, *options, *more)["points"][0]["plain_tokens_per_second"]
        for more in ([], ["--bandwidth", "1340"], ["--overhead-ms", "40"])
    )
    assert slower < 0.6 * plain
    assert 1 / loaded - 1 / plain == pytest.approx(0.040 - 0.00096)


def test_acceptance_is_one_number_or_one_a_budget(config_file: str) -> None:
    options = ["--gpu", "h100", "--batch", "8", "--context", "48k", "--budget", "512,4096"]
    drafts = [
        document(config_file, *options, "--acceptance", given)["points"][0]["draft"]
        for given in ("0.8", "0.5,0.95")
    ]
    assert [(d["draft_budget"], d["acceptance"]) for d in drafts] == [(512, 0.8), (4096, 0.95)]
    assert "so the smallest wins" in " ".join(
        run(config_file, *options, "--acceptance", "0.8").split()
    )


def test_this_machine_is_measured(model_dirs: Callable[[str], Path]) -> None:
    text = run(str(model_dirs("llama")), "--batch", "1")
    assert "measured here" in " ".join(text.split())


def test_an_uneven_split_is_planned_with_what_the_engine_says_of_it(config_file: str) -> None:
    found = document(config_file, "--gpu", "h100", "--tp", "3", "--batch", "1", "--context", "8k")
    assert "split unevenly" in found["notes"][0]
    assert found["notes"][1] == "tensor_parallel_size 1, 2, 4, 8 split the heads evenly"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(config_file: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan{suffix}"
    run(config_file, "--gpu", "l40", "--plot", str(path), "--context", "512,128k")
    content = path.read_bytes()
    if suffix == ".svg":
        assert b"<svg" in content
        return
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert 1200 <= width <= 2400 and 500 <= height <= 1200
    assert len(content) > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "gpu must be one of b200, h200, h100, "),
        (["--gpu", "l4", "--dtype", "float32"], "the smallest tensor_parallel_size that fits is 2"),
        (["--gpu", "h100", "--batch", "512", "--context", "128k"], "contexts up to 833 at batch"),
        (["--gpu", "h100", "--tp", "64"], "1, 2, 4, 8 split the 8 KV heads evenly"),
        (["--gpu", "h100", "--batch", "1;2"], "batch must be whole numbers parted by commas, got"),
        (["--gpu", "h100", "--context", "1m"], "context must be whole numbers parted by commas"),
        (["--gpu", "h100", "--context", "0"], "context must be at least 1, got 0"),
        (["--gpu", "h100", "--context", "256k"], "must be at most 131072, got 262144"),
        (["--gpu", "h100", "--acceptance", "1.2"], "acceptance must be between 0 and 1, got 1.2"),
        (["--gpu", "h100", "--acceptance", "high"], "acceptance must be numbers parted by commas"),
        (["--gpu", "h100", "--budget", "50"], "budget must be at least 96, got 50"),
        (["--gpu", "h100", "--drafter", "medusa"], "drafter must be one of streaming, snapkv,"),
        (["--gpu", "h100", "--drafter", "draft_model"], "draft_model needs draft_model"),
        (["--gpu", "h100", "--max-draft-length", "17"], "max_draft_length must be at most 16"),
        (["--gpu", "h100", "--bandwidth", "nan"], "must be above 0 and below 1e9 GB/s, got nan"),
        (["--gpu", "h100", "--bandwidth", "3e12"], "bandwidth must be above 0 and below 1e9 GB/s"),
        (["--gpu", "h100", "--memory", "0"], "memory must be above 0 and below 1e9 GB, got 0"),
        (["--gpu", "h100", "--overhead-ms", "-1"], "overhead_ms must be at least 0 and below 1e9"),
        (["--gpu", "h100", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
        (["--plot", "/no/such/folder/a.png"], "plot: there is no folder '/no/such/folder'"),
        (["--plot", "a.gif"], "plot must end in .png, .svg or .pdf, got 'a.gif'"),
    ],
)
def test_mistakes_are_one_line(config_file: str, arguments: list[str], message: str) -> None:
    check_one_line([config_file, *arguments], message)


def check_one_line(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("magicdec: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_models_that_cannot_be_planned_are_one_line(tmp_path: Path) -> None:
    MixtralConfig().save_pretrained(tmp_path / "moe")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("no json")
    for name, message in (
        ("moe", "num_local_experts is 8: experts are not modelled"),
        ("gpt2", "no dense decoder with gated MLPs"),
        ("empty.json", "empty.json"),
        ("text.json", "not a valid JSON file"),
        ("absent", "is neither an existing folder nor a Hugging Face id"),
    ):
        check_one_line([str(tmp_path / name), "--gpu", "h100"], message)
    check_one_line(["nobody/such-a-model", "--gpu", "h100"], "has no config in the local cache")


def test_the_table_takes_measured_figures() -> None:
    """Rates alone: no shares, no KV pool."""
    draft = DraftFigures(4, 150.0, "recycled", 512)
    points = [PointFigures(8, 2048, None, 100.0, draft), PointFigures(16, 2048)]
    console = Console(width=80, record=True)
    console.print(points_table(points, 80))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[-2] == ["8", "2,048", "-", "100", "150", "1.50", "4", "512"]
    assert lines[-1] == ["16", "2,048", *["-"] * 6]
