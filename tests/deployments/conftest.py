"""The real Serve application over a tiny fp32 model: one Ray a session, one app at a time."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from openai import OpenAI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from magicdec.deployments.app import APP_NAME, REPLICA_DEPLOYMENT, build
from magicdec.deployments.local_ray import start_local_ray
from magicdec.deployments.replica_api import ReplicaDescription
from magicdec.deployments.settings import ServeSettings, load_settings

PORT = 8123
MODEL = "tiny"
# Short prompts are drafted too: no view is too much of the context.
TINY_SPECULATION = {
    "draft_length": 3,
    "draft_budget": 32,
    "max_draft_length": 8,
    "max_draft_budget": 128,
    "max_view_share": 1.0,
    "num_sink_tokens": 4,
    "num_recent_tokens": 2,
}


class ServedApp:
    """The application as a test sees it: an endpoint, and what its replicas say of themselves."""

    url = f"http://127.0.0.1:{PORT}"

    def __init__(self) -> None:
        self._replicas = serve.get_deployment_handle(REPLICA_DEPLOYMENT, APP_NAME)

    def client(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def replicas(self) -> list[ReplicaDescription]:
        """Those alive; asked again while one that was killed is still on Serve's list, and the one
        in its place is not."""
        for _ in range(100):
            try:
                found: list[ReplicaDescription]
                found = self._replicas.broadcast("describe").results(timeout_s=20)
                return found
            except (RayActorError, DeploymentUnavailableError):  # or its list is empty
                time.sleep(0.05)
        pytest.fail("Serve's list of replicas does not come to rest")


def tiny_settings(
    path: Path,
    *,
    tensor_parallel_size: int = 1,
    speculation: dict[str, Any] | None = None,
    max_num_seqs: int = 16,
    **server: Any,
) -> ServeSettings:
    """An engine whose limits are low enough to be met in a test."""
    return load_settings(
        None,
        {
            "model": {"path": str(path), "dtype": "float32", "served_name": MODEL},
            "cache": {"block_size": 8, "num_blocks": 512},
            "scheduler": {"max_num_seqs": max_num_seqs, "max_batch_tokens": 128},
            "speculation": TINY_SPECULATION | (speculation or {}),
            "parallel": {"num_threads": 1, "tensor_parallel_size": tensor_parallel_size},
            "server": {"port": PORT, "keep_alive_s": 0.2, **server},
        },
    )


@pytest.fixture(scope="session")
def local_ray(tiny_model_dir: Path) -> Iterator[None]:
    os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
    start_local_ray(tiny_settings(tiny_model_dir).server, show_worker_logs=False)
    yield
    ray.shutdown()


AppFactory = Callable[..., ServedApp]


@pytest.fixture(scope="session")
def run_app(local_ray: None, tiny_model_dir: Path) -> AppFactory:
    """Deploys the application with the given settings, unless that is what runs already."""
    running: list[ServeSettings] = []

    def run(**changes: Any) -> ServedApp:
        settings = tiny_settings(tiny_model_dir, **changes)
        if running != [settings]:
            if running:
                serve.delete(APP_NAME)
            serve.run(build(settings), name=APP_NAME)
            running[:] = [settings]
        return ServedApp()

    return run
