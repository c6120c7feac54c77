"""The command line: what a person reads, and one line with exit code 2 for what they can mend."""

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from magicdec.deployments.cli import app
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.serve_command import draft_line
from magicdec.deployments.settings import parse_settings

RUNNER = CliRunner()


def test_help_names_every_command() -> None:
    text = RUNNER.invoke(app, ["--help"]).output
    assert all(command in text for command in ("serve", "generate", "models"))


@pytest.mark.parametrize("command", ["serve", "generate", "models"])
def test_each_command_has_help(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which nothing was converted yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("empty_cache")
def test_models_lists_the_embedded_one() -> None:
    assert EMBEDDED_MODEL_NAME in RUNNER.invoke(app, ["models"]).output


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("command", [["serve"], ["generate", "hello"]])
def test_a_wrong_draft_model_is_told_before_anything_is_converted(command: list[str]) -> None:
    check_one_line([*command, "--draft-model", "/no/such/draft"], "'/no/such/draft' is neither")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "/no/such/file.yaml"], "cannot read /no/such/file.yaml"),
        (["--model", "/no/such/model"], "'/no/such/model' is neither an existing folder"),
        (["--draft-length", "17"], "draft_length must be at most 16, got 17"),
        (["--drafter", "medusa"], "drafter must be one of streaming, snapkv, recycled,"),
        (["--drafter", "draft_model"], "drafter draft_model needs the path of a draft model"),
        (["--draft-budget", "83"], "draft_budget must be at least 84, got 83"),
        (["--draft-model", "/no/such/draft"], "'/no/such/draft' is neither an existing folder"),
        (["--verification", "exact"], "verification must be one of shared_gumbel, optimal_"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
@pytest.mark.parametrize("command", [["serve"], ["generate", "hello"]])
def test_mistakes_are_one_line(command: list[str], arguments: list[str], message: str) -> None:
    check_one_line([*command, *arguments], message)


def test_a_wrong_port_is_one_line() -> None:
    check_one_line(["serve", "--port", "70000"], "server.port")


def check_one_line(command: list[str], message: str) -> None:
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("magicdec: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = RUNNER.invoke(app, ["serve", "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr == f"magicdec: cannot listen on 127.0.0.1:{port}: address already in use\n"


@pytest.mark.parametrize(
    ("draft", "line"),
    [
        ({}, "each round chooses: recycled, ngram; 0 to 16 tokens over 256 or 512 or 1,024"),
        ({"drafter": "snapkv", "draft_budget": 0.1}, "snapkv; 0 to 16 tokens over 10.0% of the"),
        ({"draft_length": 4}, "recycled, length 4, budget 512 positions"),
        ({"draft_budget": 2048.0, "draft_length": 2}, "length 2, budget 2,048 positions"),
        ({"draft_length": 0}, "off (draft length 0)"),
    ],
)
def test_the_start_up_table_says_what_drafts(draft: dict[str, Any], line: str) -> None:
    assert line in draft_line(parse_settings({"speculation": draft}).speculation)


def test_generate_streams_text_and_counts(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello")
    model = [
        "--model",
        str(tiny_model_dir),
        "--dtype",
        "float32",
        "--kv-cache-gib",
        "0.01",
        "--draft-length",
        "3",
    ]
    generate = ["generate", *model, "--no-chat", "--max-tokens", "12"]
    from_file = RUNNER.invoke(app, [*generate, "--prompt-file", str(prompt)])
    assert from_file.exit_code == 0, from_file.stderr
    assert "5 prompt tokens" in from_file.stderr
    assert from_file.stdout.endswith("\n") and len(from_file.stdout) > 1
    assert RUNNER.invoke(app, [*generate, "hello"]).stdout == from_file.stdout
    assert RUNNER.invoke(app, generate, input="hello").stdout == from_file.stdout


def test_generate_refuses_what_does_not_fit(tiny_model_dir: Path) -> None:
    model = ["--model", str(tiny_model_dir), "--dtype", "float32", "--kv-cache-gib", "0.01"]
    result = RUNNER.invoke(app, ["generate", *model, "--no-chat", "x" * 600])
    assert result.exit_code == 2
    assert "maximum context length is 512 tokens" in result.stderr
