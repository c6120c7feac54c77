"""What a pod does before it ends: nothing new, and as long as there is something old."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import pytest

from magicdec.config import SchedulerConfig
from magicdec.deployments.drain_pod import EXPORT_LAG_S, PERIOD_S, drain, num_live_sequences
from magicdec.deployments.replica import report_for_ever
from magicdec.deployments.replica_report import ReportAnswer, Requests
from magicdec.routing.reports import ReplicaReport
from magicdec.stats import EngineLoad

LABELS = '{ReplicaId="a",model_name="m"}'
LIMIT_S = 60.0


def metrics(running: int, waiting: int = 0) -> str:
    return (
        "# HELP ray_vllm_num_requests_running Sequences\n"
        f"ray_vllm_num_requests_running{LABELS} {running}.0\n"
        f"ray_vllm_num_requests_waiting{LABELS} {waiting}.0\n"
        f"ray_vllm_num_requests_running{LABELS.replace('a', 'b')} 0.0\n"
        f"ray_magicdec_kv_capacity_tokens{LABELS} 4096.0\n"
    )


class Pod:
    """Its exporter and its clock; sequences end at a time of it."""

    def __init__(self, ends_at: float, answers_from: float = 0.0) -> None:
        self.now = 0.0
        self._ends_at = ends_at
        self._answers_from = answers_from

    def read(self) -> str:
        if self.now < self._answers_from:
            raise URLError("refused")
        return metrics(int(self.now < self._ends_at))

    def drain(self, folder: Path) -> bool:
        def sleep(seconds: float) -> None:
            self.now += seconds

        return drain(folder / "file", LIMIT_S, self.read, clock=lambda: self.now, sleep=sleep)


def test_sequences_of_all_replicas_count() -> None:
    assert num_live_sequences(metrics(3, 2)) == 5
    assert num_live_sequences("# nothing\n") == 0


def test_a_pod_ends_when_its_streams_have(tmp_path: Path) -> None:
    pod = Pod(ends_at=30.0)
    assert pod.drain(tmp_path)
    assert (tmp_path / "file").exists()
    assert 30.0 <= pod.now <= 30.0 + PERIOD_S


def test_an_idle_pod_waits_for_one_export_alone(tmp_path: Path) -> None:
    pod = Pod(ends_at=0.0)
    assert pod.drain(tmp_path)
    assert EXPORT_LAG_S <= pod.now <= EXPORT_LAG_S + PERIOD_S


@pytest.mark.parametrize("pod", [Pod(ends_at=1e9), Pod(ends_at=0.0, answers_from=1e9)])
def test_it_waits_no_longer_than_it_is_told(pod: Pod, tmp_path: Path) -> None:
    assert not pod.drain(tmp_path)
    assert LIMIT_S <= pod.now <= LIMIT_S + PERIOD_S


class Replica:
    """The engine loop of a replica that lives for three reports, and the router that takes them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.reports: list[ReplicaReport] = []

    @property
    def is_alive(self) -> bool:
        return len(self.reports) < 3

    @property
    def report(self) -> "Replica":
        return self

    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, free_kv_tokens=10, total_kv_tokens=10)

    def take_policy(self) -> None:
        return None

    async def remote(self, replica_id: str, report: ReplicaReport, policy: None) -> ReportAnswer:
        self.reports.append(report)
        self._file.touch()
        return ReportAnswer(True)


async def test_a_replica_tells_the_router_once_the_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "draining"
    replica = Replica(file)
    requests = Requests(SchedulerConfig(max_num_seqs=4, max_batch_tokens=128))
    await report_for_ever(cast(Any, replica), "r", cast(Any, replica), requests, file)
    assert [report.draining for report in replica.reports] == [False, True, True]


def test_the_command_says_how_it_went(tmp_path: Path) -> None:
    """As the chart calls it, where nothing exports."""
    file = tmp_path / "draining"
    command = [sys.executable, "-m", "magicdec.deployments.drain_pod", str(file), "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and file.exists() and not done.stderr
