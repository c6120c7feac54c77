"""`magicdec serve`: Ray, Serve and the application on this machine until Ctrl-C."""

import signal
import threading
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from magicdec.deployments.embedded_model import (
    EMBEDDED_MODEL_NAME,
    list_models,
    resolve_models,
)
from magicdec.deployments.engine_settings import SpeculationSettings
from magicdec.deployments.local_ray import check_port, start_local_ray
from magicdec.deployments.replica_api import ReplicaDescription
from magicdec.deployments.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class Server:
    """The running application."""

    url: str
    replica: ReplicaDescription


def serve(settings: ServeSettings, console: Console, *, verbose: bool) -> None:
    """Serves until SIGINT or SIGTERM. Raises SettingsError, ModelNotFoundError, StartFailed."""
    check_port(settings.server.host, settings.server.port)
    _prepare(settings)
    try:
        with console.status(f"Starting {settings.model.name} ..."):
            server = start(settings, show_worker_logs=verbose)
        stopped = _stop_on_signals()
        console.print(summary(settings, server))
        console.print("Ready. Ctrl-C stops the server.")
        stopped.wait()
        console.print("Stopping ...")
    finally:
        stop()


def _prepare(settings: ServeSettings) -> None:
    """Converts models, here, so that progress bars and errors are seen. Where that takes a while,
    as on a first start, the CPU kernels are compiled beside it."""
    converts = EMBEDDED_MODEL_NAME in settings.model_paths and not list_models()[0].converted
    compiling = threading.Thread(target=_compile_kernels, daemon=True)
    if converts:
        compiling.start()
    resolve_models(settings.model_paths)
    if converts:
        compiling.join()


def _compile_kernels() -> None:
    import torch  # seconds, and needed here only once

    from magicdec.kernels.compiled import compiled_library

    if not torch.cuda.is_available():
        compiled_library()


def start(settings: ServeSettings, *, show_worker_logs: bool) -> Server:
    """Starts everything and waits until requests can be served. Raises StartFailed."""
    start_local_ray(settings.server, show_worker_logs=show_worker_logs)
    from ray import serve as ray_serve

    from magicdec.deployments.app import APP_NAME, REPLICA_DEPLOYMENT, build
    from magicdec.deployments.app_start import run_application

    run_application(build(settings), APP_NAME, "/")
    replicas = ray_serve.get_deployment_handle(REPLICA_DEPLOYMENT, APP_NAME)
    replica: ReplicaDescription = replicas.describe.remote().result(timeout_s=30)
    return Server(f"http://{settings.server.host}:{settings.server.port}", replica)


def stop() -> None:
    """Ends every process of the local cluster; streams that are open are cut."""
    import ray

    ray.shutdown()


def summary(settings: ServeSettings, server: Server) -> Table:
    """What was chosen, for the terminal."""
    replica, server_settings = server.replica, settings.server
    rows = {
        "model": f"{settings.model.name} ({settings.model.dtype})",
        "context": f"{replica.max_model_len:,} tokens",
        "replicas": f"{server_settings.num_replicas}, {replica.num_ranks} rank(s) each",
        "attention": replica.attention_backend,
        "KV capacity": f"{replica.kv_capacity_tokens:,} tokens a replica",
        "draft": draft_line(settings.speculation),
        "API keys": "required" if server_settings.api_keys_file else "not required",
        "URL": f"{server.url}/v1",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def draft_line(speculation: SpeculationSettings) -> str:
    """What drafts for a request that asks for nothing."""
    config = speculation.config()
    if config.adaptive is not None:
        names = ", ".join(config.adaptive.drafters)
        budgets = " or ".join(_positions(budget) for budget in config.adaptive.draft_budgets)
        return f"each round chooses: {names}; 0 to {config.max_draft_length} tokens over {budgets}"
    if config.draft_length == 0:
        return "off (draft length 0)"
    read = _positions(config.draft_budget)
    return f"{config.drafter}, length {config.draft_length}, budget {read} positions"


def _positions(budget: float) -> str:
    return f"{budget:,g}" if budget >= 1 else f"{budget:.1%} of the context's"


def _stop_on_signals() -> threading.Event:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped
