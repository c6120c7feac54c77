"""The command line: what a person reads, and one line with exit code 2 for what they can mend."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicdec.deployments.cli import app
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME

RUNNER = CliRunner()


def test_help_names_every_command() -> None:
    text = RUNNER.invoke(app, ["--help"]).output
    assert all(command in text for command in ("serve", "generate", "models"))


@pytest.mark.parametrize("command", ["serve", "generate", "models"])
def test_each_command_has_help(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_models_lists_the_embedded_one() -> None:
    assert EMBEDDED_MODEL_NAME in RUNNER.invoke(app, ["models"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "/no/such/file.yaml"], "cannot read /no/such/file.yaml"),
        (["--model", "/no/such/model"], "'/no/such/model' is neither an existing folder"),
        (["--port", "70000"], "server.port"),
        (["--draft-length", "17"], "draft_length must be at most 16, got 17"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["serve", *arguments])
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


def test_generate_streams_text_and_counts(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello")
    model = ["--model", str(tiny_model_dir), "--dtype", "float32", "--kv-cache-gib", "0.01"]
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
