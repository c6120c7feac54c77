"""Starting Ray as `magicdec serve` does, in a process whose output is what a user would see."""

import os
import subprocess
import sys

import pytest

CODE = """
import ray
from magicdec.deployments.local_ray import start_local_ray
from magicdec.deployments.settings import ServerSettings
start_local_ray(ServerSettings(port=8125), show_worker_logs=False)
import os

@ray.remote(num_cpus=0)
def draws_no_bars():
    return os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]

assert ray.get(draws_no_bars.remote()) == "1"
print(os.environ["RAY_AUTH_MODE"])
ray.shutdown()
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """Without what a Ray in the tests' own process has set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_HUB_DISABLE"))}


def test_a_start_is_quiet_and_authenticated(environment: dict[str, str]) -> None:
    started = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert started.returncode == 0, started.stderr
    assert started.stdout == "token\n"
    assert started.stderr == ""
