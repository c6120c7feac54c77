"""Contenders as processes: asked one at a time, stopped while the others are asked."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.contest import Answer, Task

_ROOT = Path(__file__).resolve().parents[3]
_SECONDS_TO_END = 60


class ContenderFailed(Exception):
    """What a contender said, or that it ended."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start one. Contenders of one process share its loaded model."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stops: bool = True  # false: its processes watch each other, and would take a stop for a death


class ContenderProcess:
    """Ends with `close`. What it writes to standard error goes to the log."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec = spec
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                spec.command,
                cwd=_ROOT,
                env={**os.environ, **spec.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a group of its own, to be stopped whole
            )
        self._log = log
        self.num_answers = 0

    def wait_until_ready(self) -> None:
        """Loads. Raises ContenderFailed."""
        self._hear()
        self._signal(signal.SIGSTOP)

    def ask(self, task: Task) -> Answer:
        """Raises ContenderFailed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
            answer = Answer(**self._hear())
        except BrokenPipeError as error:
            raise ContenderFailed(self._ended()) from error
        finally:
            self._signal(signal.SIGSTOP)
        self.num_answers += 1
        return answer

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(_SECONDS_TO_END)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderFailed(self._ended())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ContenderFailed(message["error"])
        return message

    def _ended(self) -> str:
        return f"ended with {self._process.wait(_SECONDS_TO_END)}; {self._log} says why"

    def _signal(self, number: int) -> None:
        if self.spec.stops and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def start_all(
    specs: Sequence[Spec], folder: Path, started: dict[str, ContenderProcess | str]
) -> None:
    """Adds them to `started`, one after the other, each before it loads: whoever is interrupted
    closes what is there. A string is why one could not start."""
    for spec in specs:
        process = ContenderProcess(spec, folder / f"{spec.name}.log")
        started[spec.name] = process
        try:
            process.wait_until_ready()
        except ContenderFailed as error:
            process.close()
            started[spec.name] = str(error)
