"""Batch jobs over engines of several ranks, on a cluster that is there, and under a poison row."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from magicdec.deployments.app import REPLICA_DEPLOYMENT
from magicdec.deployments.batch_answered import AnsweredIndex
from magicdec.deployments.batch_dataset import outcomes
from magicdec.deployments.batch_engines import for_throughput, num_live_rows
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_sources import JsonLines
from magicdec.deployments.batch_stages import engine_stages
from magicdec.deployments.settings import load_settings
from tests.deployments.batch_processes import start_job, write_settings
from tests.deployments.batch_rows import DEFAULTS, completion, read_lines, run_job, write_jsonl
from tests.deployments.conftest import tiny_settings
from tests.deployments.test_batch_kills import answers, make_rows, undisturbed

POISON = "poison"


def test_a_batch_waits_for_nobody() -> None:
    settings = load_settings(None, {"server": {"num_replicas": 3, "company_wait_s": 0.1}})
    fast = for_throughput(settings)
    adaptive, of_serving = (s.engine_config().speculation.adaptive for s in (fast, settings))
    assert adaptive is not None and of_serving is not None
    assert adaptive.inter_token_target_s > 60 > of_serving.inter_token_target_s
    assert fast.admission_config().company_wait_s == 0.1
    assert fast.admission_config().max_queued_requests > num_live_rows(settings) == 96
    assert fast.cache == settings.cache and fast.model == settings.model


@pytest.mark.slow
def test_ranks_on_a_cluster_that_is_there(
    local_ray: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The job joins this session's cluster, and leaves nothing there."""
    settings = tiny_settings(tiny_model_dir, tensor_parallel_size=2, max_num_seqs=4)
    config = write_settings(tmp_path / "settings.yaml", settings)
    rows, output = make_rows(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    address = ray.get_runtime_context().gcs_address
    job = start_job(rows, output, "--config", str(config), "--address", address)
    code, said = job.finish()
    assert code == 0, said
    single = tiny_settings(tiny_model_dir, max_num_seqs=4)
    assert answers(output) == undisturbed(rows, single)
    assert not [name for name in serve.status().applications if "batch" in name]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_row_that_kills_engines_fails_alone(
    local_ray: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """An engine is killed whenever the poison row is live in it, with the others or alone."""
    settings = tiny_settings(tiny_model_dir, max_num_seqs=4)
    neighbours = [
        completion(f"row-{i}", f"{i} is longer" * 4, max_tokens=350, ignore_eos=True)
        for i in range(3)
    ]
    poison = completion(POISON, "short", max_tokens=450, ignore_eos=True)
    rows = write_jsonl(tmp_path / "in.jsonl", [poison, *neighbours])
    output, source = tmp_path / "out.jsonl", JsonLines(str(tmp_path / "in.jsonl"))
    with engine_stages(settings, "batch-poison", max_live_rows=None, patience_s=300.0) as stages:
        many, one = stages

        def answerer(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
            return outcomes(source, DEFAULTS, answered, one if alone else many)

        done = threading.Event()
        killer = threading.Thread(target=_kill_while_live, args=("batch-poison", output, done))
        killer.start()
        try:
            job = run_job(rows, output, answerer)
        finally:
            done.set()
            killer.join()
    lines = {line["custom_id"]: line for line in read_lines(output)}
    assert job.num_errors == 1 and len(lines) == 4
    assert lines[POISON]["error"]["code"] == "replica_died_twice"


def _kill_while_live(app_name: str, output: Path, done: threading.Event) -> None:
    """Kills an engine that runs all rows that are left. At first those are all; when rows run one
    at a time, it is the poison row, the shortest and so the last."""
    replicas = serve.get_deployment_handle(REPLICA_DEPLOYMENT, app_name)
    while not done.is_set():
        time.sleep(0.3)
        if output.exists() and f'"custom_id":"{POISON}"' in output.read_text():
            return
        try:
            found = replicas.describe.remote().result(timeout_s=20)
        except Exception:  # it was just killed, and the next one is not there yet
            continue
        num_left = 4 - (output.read_bytes().count(b"\n") if output.exists() else 0)
        if found.load.num_running == num_left:
            os.kill(found.pid, signal.SIGKILL)
