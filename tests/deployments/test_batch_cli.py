"""`magicdec batch run` without engines: what it prints and how it ends."""

from io import StringIO
from pathlib import Path

import fsspec
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from magicdec.deployments.batch_manifest import manifest_path
from magicdec.deployments.batch_output import JobStopped
from magicdec.deployments.batch_progress import Figures, ProgressView, duration, summary_table
from magicdec.deployments.batch_row import BatchRow
from magicdec.deployments.batch_upload import OutputPlace
from magicdec.deployments.cli import app
from tests.deployments.batch_rows import answer, completion, write_jsonl
from tests.deployments.conftest import MODEL

RUNNER = CliRunner()
ROW = BatchRow("here", "a", "/v1/completions", {"prompt": "a"})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [completion("a"), completion("b")])


def dry_run(rows: Path | str, output: Path, model_dir: Path, *arguments: str) -> Result:
    model = ["--model", str(model_dir), "--served-name", MODEL]
    command = ["batch", "run", str(rows), str(output), *model, "--dry-run", *arguments]
    return RUNNER.invoke(app, command)


def test_a_dry_run_checks_and_writes_nothing(rows: Path, tiny_model_dir: Path) -> None:
    output = rows.with_name("out.jsonl")
    result = dry_run(rows, output, tiny_model_dir)
    assert result.exit_code == 0
    assert "The input has 2 rows" in result.stderr and "0 answered" in result.stderr
    assert not output.exists() and not manifest_path(output).exists()


def test_rows_that_will_fail_are_told_first(rows: Path, tiny_model_dir: Path) -> None:
    write_jsonl(rows, [completion("a"), completion("b", "[x]" * 200)])
    output = rows.with_name("out.jsonl")
    result = dry_run(rows, output, tiny_model_dir)
    assert result.exit_code == 3
    assert "1 row will fail:\n  " in result.stderr
    assert f"{rows}:2: This model's maximum context length is 512 tokens" in result.stderr
    strict = dry_run(rows, output, tiny_model_dir, "--strict")
    assert strict.exit_code == 2 and "magicdec: 1 row will fail:" in strict.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "{text}"], "--template is for Parquet and folders of text"),
        (["--template", "summarise"], "--template holds no {field}"),
        (["--api-key-file", "/no/key"], "--api-key-file is for --endpoint"),
        (["--address", "a:1", "--endpoint", "http://h"], "--address or --endpoint, not both"),
        (["--endpoint", "http://h"], "--model is the server's to choose"),
        (["--draft-length", "17"], "draft_length must be at most 16, got 17"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    rows: Path, tiny_model_dir: Path, arguments: list[str], message: str
) -> None:
    result = dry_run(rows, rows.with_name("out.jsonl"), tiny_model_dir, *arguments)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("magicdec: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_models_rows_are_refused(rows: Path, tiny_model_dir: Path) -> None:
    write_jsonl(rows, [completion("a", model="gpt-4")])
    result = dry_run(rows, rows.with_name("out.jsonl"), tiny_model_dir)
    assert result.exit_code == 2
    assert f"magicdec: {rows}:1: body.model must be 'tiny'" in result.stderr
    assert not rows.with_name("out.jsonl").exists()


def test_an_endpoint_that_is_not_there_is_one_line(rows: Path) -> None:
    command = ["batch", "run", str(rows), str(rows.with_name("out.jsonl"))]
    result = RUNNER.invoke(app, [*command, "--endpoint", "http://127.0.0.1:9/v1"])
    assert result.exit_code == 2
    assert "http://127.0.0.1:9/v1/models does not answer" in result.stderr


def test_figures_are_of_this_run() -> None:
    figures = Figures(num_rows=10, num_answered=4)
    assert figures.line() == "4/10 rows"
    for _ in range(2):
        figures.add(answer(ROW))
    figures.add(answer(ROW, is_error=True))
    figures.seconds = 5.0
    assert figures.line() == ("7/10 rows, 1 errors, 2.0 tokens/s, 2.50 tokens a round, 0:05 left")
    assert [duration(s) for s in (0.4, 61, 3600 * 30 + 5)] == ["0:00", "1:01", "30:00:05"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_has_every_figure(is_terminal: bool) -> None:
    figures = Figures(num_rows=3, num_answered=1)
    console = Console(file=StringIO(), force_terminal=is_terminal, width=100)
    with ProgressView(console, figures) as view:
        view.add(answer(ROW))
    console.print(summary_table(figures, "out.jsonl", num_errors=2))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "2 in the output, 0 of this run" in text and "3 in, 5 out" in text
    assert ("2/3 rows" in text) == is_terminal  # a bar; lines come every ten seconds


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"memory://{tmp_path.name}/out.jsonl"  # a folder of its own


def read(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return bytes(file.read())


def write(place: OutputPlace, content: bytes) -> None:
    with place.path.open("ab") as file:
        file.write(content)
    manifest_path(place.path).write_bytes(b"{}")


def test_an_output_at_a_url_is_uploaded_however_the_run_ends(remote: str) -> None:
    place = OutputPlace.of(remote)
    with pytest.raises(KeyboardInterrupt), place.staged():
        write(place, b"one\n")
        raise KeyboardInterrupt
    assert read(remote) == b"one\n" and read(f"{remote}.manifest.json") == b"{}"
    assert not place.path.exists()
    with place.staged():
        assert place.path.read_bytes() == b"one\n"
        write(place, b"two\n")
    assert read(remote) == b"one\ntwo\n"


def test_a_killed_runs_copy_is_gone_on_with(remote: str) -> None:
    place = OutputPlace.of(remote)
    place.path.parent.mkdir(parents=True)
    write(place, b"one\n")
    with place.staged():
        write(place, b"two\n")
    assert read(remote) == b"one\ntwo\n"


def test_an_upload_that_fails_keeps_the_copy(tmp_path: Path, remote: str) -> None:
    place = OutputPlace(f"file://{tmp_path}/no/folder/out.jsonl", tmp_path / "copy.jsonl", True)
    with pytest.raises(JobStopped, match="the same command tries again"), place.staged():
        write(place, b"one\n")
    assert place.path.read_bytes() == b"one\n"
