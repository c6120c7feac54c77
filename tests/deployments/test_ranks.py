"""A replica of two DeepSpeed ranks: one is killed, and the stream goes on when it is back."""

import os
import signal

import pytest

from tests.deployments.conftest import AppFactory
from tests.deployments.test_failover import Stream
from tests.processes import live_ranks

pytestmark = pytest.mark.slow


def test_stream_survives_a_rank(run_app: AppFactory) -> None:
    app = run_app(tensor_parallel_size=2)
    undisturbed = Stream(app).read()
    assert undisturbed.done and undisturbed.error is None
    stream = Stream(app).read(at_least=40)
    replica = app.replicas()[0]
    # Ray's processes are children of the test's own.
    ranks = live_ranks()
    assert len(ranks) == 2
    os.kill(ranks[0].pid, signal.SIGKILL)
    stream.read()
    assert stream.error is None and stream.token_ids == undisturbed.token_ids
    assert app.replicas()[0].pid != replica.pid
