"""A batch job as a process of its own, for a test to kill parts of."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from magicdec.deployments.settings import ServeSettings

DRIVER, WORKER, ENGINE = "driver", "worker", "engine"
TITLES = {WORKER: "MapWorker", ENGINE: "EngineReplica"}  # of Ray's processes


@dataclass(slots=True)
class RunningJob:
    """`magicdec batch run`, and what Ray started for it."""

    process: "subprocess.Popen[str]"
    output: Path

    def num_lines(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def wait_for_lines(self, wanted: int, timeout_s: float = 120) -> None:
        self.wait_until(lambda: self.num_lines() >= wanted, timeout_s)

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the job did not get there: {self.finish(1)}")
            time.sleep(0.02)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self, victim: str) -> None:
        """With SIGKILL. The driver's cluster ends with it."""
        if victim == DRIVER:
            self.process.kill()
            self.process.wait()
            return
        found = [p for p in self.children() if TITLES[victim] in _title(p)]
        assert found, f"no {victim} among {[_title(p) for p in self.children()]}"
        found[0].kill()

    def finish(self, timeout_s: float = 180) -> tuple[int | None, str]:
        """Exit code, and what it said."""
        try:
            _, said = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
            return None, said
        return self.process.returncode, said


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def write_settings(path: Path, settings: ServeSettings) -> Path:
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    return path


def start_job(rows: Path, output: Path, *arguments: str) -> RunningJob:
    command = [sys.executable, "-m", "magicdec.deployments.cli", "batch", "run"]
    process = subprocess.Popen(
        [*command, str(rows), str(output), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return RunningJob(process, output)
