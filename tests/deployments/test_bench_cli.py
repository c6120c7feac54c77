"""`magicdec bench` as a person and a program see it, on a model of a few thousand weights."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from magicdec.config import (
    CPU_KV_CACHE_BYTES,
    AdaptiveConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    SpeculativeConfig,
)
from magicdec.deployments.bench_inputs import BenchRequest, check_pool, pool_tokens
from magicdec.deployments.bench_points import BenchReport, MeasuredPoint
from magicdec.deployments.bench_table import draft_text, print_report, report_document
from magicdec.deployments.cli import app
from magicdec.deployments.live_bench import Round, Segment
from magicdec.planning.devices import PlanDevice
from magicdec.planning.figures import DraftFigures, PointFigures
from magicdec.planning.memory import PlanModel
from magicdec.roofline import ModelGeometry

RUNNER = CliRunner()
MODEL = PlanModel("some-model", ModelGeometry(2, 64, 4, 2, 16, 128, 384))
SETTINGS = """
cache: {block_size: 8, num_blocks: 96}
scheduler: {max_num_seqs: 2, max_batch_tokens: 64}
speculation: {draft_budgets: [0.2, 16], num_sink_tokens: 4, num_recent_tokens: 2,
              max_draft_length: 2, max_draft_budget: 64, max_view_share: 1.0}
parallel: {num_threads: 1}
"""
POINTS = ["--batch", "3,1", "--context", "48,96", "--seconds", "0.02", "--rounds", "2:4"]


@pytest.fixture(scope="module", autouse=True)
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of their own, filled by the first bench."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def arguments(
    model_dirs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    path = tmp_path_factory.mktemp("bench") / "settings.yaml"
    path.write_text(SETTINGS)
    return ["--config", str(path), "--model", str(model_dirs("llama"))]


def run(*arguments: str) -> tuple[str, str]:
    """stdout and stderr."""
    result = RUNNER.invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_every_point_is_planned_and_measured(arguments: list[str], profiles: Path) -> None:
    """More sequences at once than the settings allow, too: the bench raises max_num_seqs."""
    out, err = run(*arguments, *POINTS, "--json")
    found = json.loads(out)
    assert "prefill of 3 x 96 tokens: about 1 s; then 4 points: about" in err
    points = found["points"]
    asked = [(3, 48), (3, 96), (1, 48), (1, 96)]
    assert [(p["batch_size"], p["context_len"]) for p in points] == asked
    for point in points:
        plan, here = point["plan"], point["here"]
        assert plan["speedup"] >= 1.0 and plan["plain_tokens_per_second"] > 0.0
        assert here["plain_tokens_per_second"] > 0.0
        assert len(here["speedups"]) >= 3 and min(here["speedups"]) <= here["speedup"]
        assert sum(here["choices"].values()) == pytest.approx(1.0)
        assert here["chosen"] == next(iter(here["choices"]))
    assert (found["num_threads"], found["dtype"]) == (1, "bfloat16")
    assert "measured here" in found["device"]["origin"]
    assert list((profiles / "magicdec" / "profiles").glob("*.json")), "the profile is not kept"


def test_a_text_of_ones_own_is_gone_on_from(arguments: list[str], tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night. " * 4)
    out, _ = run(*arguments, "--batch", "1", "--context", "64", *POINTS[4:], "--text", str(text))
    row = [line.split() for line in out.splitlines() if line.split()[:2] == ["1", "64"]]
    assert float(row[0][3].replace(",", "")) > 0.0
    assert "medians of " in out and " pairs of segments" in out


def segment(seconds: float, *plans: str, drafted: int = 0, accepted: int = 0) -> Segment:
    """Sixty tokens."""
    rounds = tuple(Round(plan, 60 // len(plans), seconds / len(plans)) for plan in plans)
    return Segment(60, seconds, drafted, accepted, rounds)


def report(*, plain: float = 100.0) -> BenchReport:
    """Two points: one that drafts, and one for whose KV the plan sees no room."""
    plans = ("recycled 4 x 512", "ngram 3 x 512", "recycled 4 x 512", "ngram 3 x 512 (trial)")
    pairs = tuple(
        (segment(0.6, "plain"), segment(seconds, *plans, drafted=12, accepted=9))
        for seconds in (0.5, 0.4, 0.3)
    )
    same = tuple((segment(0.5, "plain"), segment(0.5, "plain")) for _ in range(3))
    drafts = DraftFigures(5, 1.4 * plain, "ngram", None, 0.8)
    speculation = SpeculativeConfig(adaptive=AdaptiveConfig())
    return BenchReport(
        model="some-model",
        config=EngineConfig(ModelConfig("some-model"), speculation=speculation),
        device=PlanDevice("some-cpu", 2e10, 5e11, 3e10),
        attention="flash",
        num_threads=2,
        planned=(PointFigures(8, 4096, 0.3, plain, drafts), PointFigures(16, 4096, 1.2)),
        measured=(MeasuredPoint(8, 4096, pairs), MeasuredPoint(16, 4096, same)),
    )


def printed(found: BenchReport, columns: int) -> list[str]:
    out = io.StringIO()
    print_report(found, Console(file=out, width=columns))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("columns", [80, 130])
def test_table_and_json_agree(columns: int) -> None:
    lines = printed(report(), columns)
    assert max(len(line) for line in lines) <= columns
    text = "\n".join(lines)
    assert "…" not in text, "a column was cut"
    assert lines[0] == "some-model on some-cpu, bfloat16, flash, 2 threads"
    rows = [line.split() for line in lines if line.split()[1:2] == ["4,096"]]
    words = " ".join(text.split())
    point, unplanned = report_document(report())["points"]
    here = point["here"]
    assert rows[0][2:8] == ["100", "100", "140", "150", "1.40", "1.50"]
    assert [round(here[name], 6) for name in ("plain_tokens_per_second", "speedup")] == [100, 1.5]
    assert here["speculative_tokens_per_second"] == pytest.approx(150)
    assert point["plan"]["speedup"] == pytest.approx(1.4)
    assert "ngram 5" in words and "0.75" in words and "1.20-2.00" in words
    assert here["acceptance"] == 0.75
    assert here["speedups"] == pytest.approx([1.2, 1.5, 2.0])
    # Trials are not what was chosen.
    assert here["chosen"] == "recycled 4 x 512"
    assert here["choices"] == {
        "recycled 4 x 512": pytest.approx(2 / 3),
        "ngram 3 x 512": pytest.approx(1 / 3),
    }
    assert rows[1][2:8] == ["-", "120", "-", "120", "-", "1.00"]
    assert unplanned["plan"]["plain_tokens_per_second"] is None
    assert unplanned["here"]["acceptance"] is None and unplanned["here"]["chosen"] == "plain"


def test_what_differs_is_said_only_where_it_does() -> None:
    near = " ".join(" ".join(printed(report(plain=104.0), 100)).split())
    far = " ".join(" ".join(printed(report(plain=200.0), 100)).split())
    assert "differs" not in near and report_document(report(plain=104.0))["notes"] == []
    assert "differs plain rate 0.50 of the planned. " in far
    assert report_document(report(plain=200.0))["notes"][0].startswith("differs: plain rate 0.50")


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ("plain", "plain"),
        ("recycled 4 x 512", "recycled 4 x 512"),
        ("streaming 2 x 0.1", "streaming 2 x 0.1"),
        ("ngram 5 x 256", "ngram 5"),
        ("draft_model 3 x 512", "draft_model 3"),
    ],
)
def test_who_reads_no_view_is_named_without_a_budget(plan: str, text: str) -> None:
    assert draft_text(plan) == text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "1;2"], "batch must be whole numbers parted by commas, got '1;2'"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--context", "1m"], "context must be whole numbers parted by commas, got '1m'"),
        (["--context", "512"], "max_position_embeddings 512 less 112 for an answer) must be at"),
        (["--context", "240", "--max-model-len", "256"], "context (max_model_len 256 less 112 for"),
        (["--batch", "4", "--context", "256"], "batches up to 2 at context 256; contexts up to 80"),
        (["--batch", "8", "--context", "256"], "at context 256; num_blocks 368\n"),
        (["--batch", "64", "--context", "400"], "at context 400; num_blocks 4,096\n"),
        (["--text", "/no/such/book.txt"], "text: cannot read /no/such/book.txt: No such file"),
        (["--seconds", "0"], "seconds must be above 0 and finite, got 0.0"),
        (["--seconds", "nan"], "seconds must be above 0 and finite, got nan"),
        (["--rounds", "many"], "rounds must be LOW:HIGH or one number, got 'many'"),
        (["--rounds", "8:4"], "rounds must be LOW:HIGH with LOW at most HIGH, got 8:4"),
        (["--rounds", "0:4"], "rounds must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--model", "/no/such/model"], "'/no/such/model' is neither an existing folder"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
        (["--drafter", "medusa"], "drafter must be one of streaming, snapkv,"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], more: list[str], message: str) -> None:
    check_one_line(
        [*arguments, "--rounds", "2:4", "--context", "48", "--batch", "1", *more], message
    )


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_pool_that_a_gpu_will_size_is_not_known_beforehand(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    token_bytes = MODEL.geometry.kv_bytes_per_token

    def held(cache: CacheConfig) -> int | None:
        return pool_tokens(EngineConfig(ModelConfig(""), cache), MODEL)

    cpu_tokens = CPU_KV_CACHE_BYTES // (64 * token_bytes) * 64
    assert held(CacheConfig()) == (None if has_gpu else cpu_tokens)
    assert held(CacheConfig(kv_cache_bytes=1 << 30)) == (1 << 30) // (64 * token_bytes) * 64
    assert held(CacheConfig(num_blocks=5)) == 320


@given(st.integers(1, 40), st.integers(1, 400), st.integers(1, 200))
def test_what_is_said_to_fit_fits_and_no_more(batch: int, context: int, num_blocks: int) -> None:
    """Whatever is too much: the largest batch and the longest context that are named."""
    config = EngineConfig(ModelConfig(""), CacheConfig(block_size=8, num_blocks=num_blocks))

    def refusal(batch_size: int, context_len: int, blocks: int) -> str:
        asked = BenchRequest((1, batch_size), (1, context_len), segment_rounds=(2, 4))
        try:
            check_pool(asked, config, MODEL, 8 * blocks)
        except ConfigError as error:
            return str(error).replace(",", "")
        return ""

    message = refusal(batch, context, num_blocks)
    assert bool(message) == (batch * -(-(context + 112) // 8) > num_blocks)
    if found := re.search(r"batches up to (\d+) at", message):
        assert not refusal(int(found[1]), context, num_blocks)
        assert refusal(int(found[1]) + 1, context, num_blocks)
    if found := re.search(r"contexts up to (\d+) at", message):
        assert not refusal(batch, int(found[1]), num_blocks)
        assert refusal(batch, int(found[1]) + 1, num_blocks)
    if found := re.search(r"num_blocks (\d+)$", message):
        assert not refusal(batch, context, int(found[1]))
        assert refusal(batch, context, int(found[1]) - 1)


def check_one_line(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("magicdec: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("speculation: {draft_length: 4}", "draft_length must be empty (the bench measures what"),
        ("parallel: {tensor_parallel_size: 2}", "tensor_parallel_size must be 1 (the bench's eng"),
        ("cache: {kv_cache_gib: 0.00003}", "pool holds 64; what would fit: kv_cache_gib 0.01\n"),
        ("cache: {kv_cache_gb: 1}", "cache.kv_cache_gb"),
    ],
)
def test_settings_that_cannot_be_measured_are_one_line(
    tiny_model_dir: Path, tmp_path: Path, section: str, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(section)
    few = ["--batch", "1,2", "--context", "48", "--rounds", "2:4"]
    check_one_line(["--config", str(path), "--model", str(tiny_model_dir), *few], message)


def test_a_short_text_says_how_long_it_must_be(arguments: list[str], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    few: list[Any] = ["--batch", "2", "--context", "48", "--rounds", "2:4", "--text", str(text)]
    message = "text: batch 2 at context 48: the text holds 9 tokens, 96 are needed; give a longer"
    check_one_line([*arguments, *few], message)
