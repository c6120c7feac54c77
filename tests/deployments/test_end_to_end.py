"""What a newcomer does: the command, the embedded model, a long prompt, Ctrl-C. Minutes of work."""

import inspect
import os
import signal
import subprocess
import sys
import time
import turtle
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.model_loader import load_tokenizer

pytestmark = pytest.mark.slow

PORT = 8124
URL = f"http://127.0.0.1:{PORT}"
COMMAND = [sys.executable, "-m", "magicdec.deployments.cli", "serve", "--port", str(PORT)]
START_LIMIT_S = 90.0  # under 40 on two idle cores; tests may share theirs
PROMPT_TOKENS = 7000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the server prints."""
    return tmp_path_factory.mktemp("serve") / "log.txt"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[subprocess.Popen[str]]:
    resolve_model(EMBEDDED_MODEL_NAME)  # its conversion is not what is timed
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with log.open("w") as output:
        process = subprocess.Popen(
            COMMAND, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment
        )
    started = time.monotonic()
    while not (_healthy() and "Ready." in log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - started < START_LIMIT_S, log.read_text()
        time.sleep(0.2)
    yield process
    if process.poll() is None:
        process.kill()


def _healthy() -> bool:
    try:
        return httpx.get(f"{URL}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def long_text() -> str:
    """A little under 7,000 tokens of real text."""
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL_NAME))
    ids = tokenizer(inspect.getsource(turtle))["input_ids"]
    return str(tokenizer.decode(ids[: PROMPT_TOKENS - 100]))


def test_a_long_prompt_is_answered(server: subprocess.Popen[str]) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=280)
    question = f"{long_text()}\n\nWhat is this Python module for? Answer in one sentence."
    chunks = list(
        client.chat.completions.create(
            model=EMBEDDED_MODEL_NAME,
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens > 6500
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(text.split()) >= 5, text


def test_the_start_is_quiet(server: subprocess.Popen[str], log: Path) -> None:
    text = log.read_text()
    assert "RAY_AUTH_MODE" not in text and "Loading weights" not in text


def test_the_port_is_taken(server: subprocess.Popen[str]) -> None:
    second = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "address already in use" in second.stderr
    assert "Traceback" not in second.stderr


def test_interrupt_stops_everything(server: subprocess.Popen[str]) -> None:
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
