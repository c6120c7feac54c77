"""The composition root as Serve's own tools see it."""

import subprocess
import sys
from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

from magicdec.deployments.app import app_builder
from magicdec.deployments.settings import ServeSettings

CONFIG = """
applications:
- name: magicdec
  route_prefix: /
  import_path: magicdec.deployments.app:app_builder
  args:
    model: {dtype: float32}
    server: {num_replicas: 2}
"""


def test_serve_build_writes_a_config(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    target = "magicdec.deployments.default_app:app"
    command = [sys.executable, "-m", "ray.serve.scripts", "build", target, "-o", str(path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    names = {deployment.name for deployment in config.applications[0].deployments}
    assert names == {"Ingress", "Router", "EngineReplica"}


def test_a_config_with_args_is_accepted() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG))
    args = config.applications[0].args
    assert ServeSettings.model_validate(args).server.num_replicas == 2
    app_builder(args)


def test_deploying_needs_no_torch() -> None:
    """The command line and the head node import the application without the engine."""
    code = "import sys, magicdec.deployments.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
