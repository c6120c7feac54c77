"""Triton's kernels compile for GPUs that are not here, and take of them what the table says."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.ahead_of_time import SHARED_BYTES, TABLE


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """By a process of its own: in this one kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = json.loads(run.stdout)
    return found


def test_kernels_take_what_the_table_says(compiled: dict[str, dict[str, int]]) -> None:
    """After a change: python -m tests.kernels.ahead_of_time > tests/kernels/ahead_of_time.json"""
    assert compiled == json.loads(TABLE.read_text())


def test_sums_stay_in_registers(compiled: dict[str, dict[str, int]]) -> None:
    """All of them on Hopper; a few words of the widest tiles spill on Ampere."""
    assert [name for name, taken in compiled.items() if taken["stack"] > _most_stack(name)] == []


def _most_stack(name: str) -> int:
    return 0 if name.startswith("sm_90") else 64


def test_every_kernel_fits_a_multiprocessor(compiled: dict[str, dict[str, int]]) -> None:
    assert all(taken["shared"] <= SHARED_BYTES[name[:5]] for name, taken in compiled.items())
