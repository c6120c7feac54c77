"""The chart's RayJob: what its driver has, and that its command is one that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.settings import load_settings
from tests.helm.chart import render


@pytest.mark.parametrize("source", ["pvc", "url"])
def test_the_driver_of_a_job_has_the_model_and_no_keys(source: str) -> None:
    """It tokenizes on the head of the job's cluster; the service's head does neither."""
    model = {
        "source": source,
        "path": "/models/it",
        "pvc": {"existingClaim": "models", "mountPath": "/models"},
        "url": {"archive": "https://host/it.tar.gz", "sha256": "0" * 64},
    }
    batch = {"enabled": True, "input": "/data/in.jsonl", "output": "/data/out.jsonl"}
    release = render({"model": model, "batch": batch, "apiKeys": {"existingSecret": "keys"}})
    (job,) = release.of_kind("RayJob")
    clusters = job["spec"]["rayClusterSpec"], release.service["spec"]["rayClusterConfig"]
    names = [
        {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        for pod in (cluster["headGroupSpec"]["template"]["spec"] for cluster in clusters)
    ]
    assert "model" in names[0] and "model" not in names[1]
    assert not any("api-keys" in found for found in names)


def test_a_job_runs_batch_over_the_services_model_and_settings(tmp_path: Path) -> None:
    """Its command, in a shell, but for the cluster: the input is checked and nothing is started."""
    rows, body = tmp_path / "it's in.jsonl", {"prompt": "Once", "max_tokens": 4}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    rows.write_text(json.dumps(row) + "\n")
    settings = {"speculation": {"draft_length": 3}, "scheduler": {"max_num_seqs": 4}}
    batch = {"enabled": True, "input": str(rows), "output": str(tmp_path / "out.jsonl")}
    batch |= {"workers": 3, "args": ["--dry-run"]}
    model = {"path": EMBEDDED_MODEL_NAME, "dtype": "float32"}
    release = render({"model": model, "settings": settings, "batch": batch})
    (job,) = release.of_kind("RayJob")
    command = job["spec"]["entrypoint"].replace("/tmp/batch-settings", f"{tmp_path}/settings")
    run = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "The input has 1 row," in run.stdout + run.stderr
    found = load_settings(str(tmp_path / "settings.json"), {})
    assert found.server.num_replicas == 3 and found.scheduler.max_num_seqs == 4
    assert found.speculation.draft_length == 3 and found.model.dtype == "float32"
