"""The application that answers a batch: the served one without HTTP, set for throughput."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from magicdec.deployments.engine_settings import SpeculationSettings
from magicdec.deployments.local_ray import ENVIRONMENT, init_local_ray, quiet_loggers
from magicdec.deployments.replica_api import ReplicaDescription
from magicdec.deployments.settings import ServeSettings, SettingsError

# Nobody waits for a single row: prompts are computed in steps as large as max_batch_tokens allows,
# and no row goes before others for having waited.
UNBOUNDED_S = 3600.0
MAX_QUEUED = 1 << 20  # the job itself bounds the rows that are live
DRAIN_S = 2.0
# Ray's C++ side calls it an error, on the terminal, that Ray Data's actors may be restarted.
QUIET_CORE = ("RAY_BACKEND_LOG_LEVEL", "fatal")
DESCRIBE_TIMEOUT_S = 60.0
ROWS_A_SEQUENCE = 2  # live for each that an engine runs, so that the next is there when one ends


def for_throughput(settings: ServeSettings) -> ServeSettings:
    """What a batch is served by: settings for latency give way, all others stand."""
    queue = {
        "max_queued_requests": MAX_QUEUED,
        "age_bound_s": UNBOUNDED_S,
        "drain_timeout_s": DRAIN_S,
    }
    return settings.model_copy(
        update={
            "server": settings.server.model_copy(update=queue),
            "speculation": _without_target(settings.speculation),
        }
    )


def _without_target(speculation: SpeculationSettings) -> SpeculationSettings:
    return speculation.model_copy(update={"inter_token_target_s": UNBOUNDED_S})


def num_live_rows(settings: ServeSettings) -> int:
    """Enough to keep every engine full; all that a death of engines can cost."""
    return ROWS_A_SEQUENCE * settings.server.num_replicas * settings.scheduler.max_num_seqs


@contextmanager
def ray_cluster(address: str | None, *, show_worker_logs: bool) -> Iterator[None]:
    """A cluster of this machine that ends with this process, or the one at `address`.

    Raises SettingsError where that cannot be joined.
    """
    if not show_worker_logs:
        os.environ.setdefault(*QUIET_CORE)
    if address is None:
        init_local_ray(show_worker_logs=show_worker_logs)
    else:
        _join(address, show_worker_logs=show_worker_logs)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, *, show_worker_logs: bool) -> None:
    if address.startswith("ray://"):
        raise SettingsError(
            "--address must be that of the cluster itself (HOST:6379, or auto on one of its "
            f"nodes), where the job runs as its driver; got {address!r}"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not show_worker_logs:
        quiet_loggers()
    try:
        ray.init(address=address, log_to_driver=show_worker_logs, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SettingsError(f"cannot join the Ray cluster at {address}: {error}") from error


@contextmanager
def engines(settings: ServeSettings, name: str) -> Iterator[ReplicaDescription]:
    """Loads the model in every replica, and gives all of it back at the end.

    An application of that name, left by a job that was killed, is replaced. Raises StartFailed.
    """
    from ray import serve

    from magicdec.deployments.app import REPLICA_DEPLOYMENT, build_engines
    from magicdec.deployments.app_start import run_application

    serve.start(proxy_location="Disabled")
    if name in serve.status().applications:
        serve.delete(name)
    try:
        run_application(build_engines(settings), name, None)
        replicas = serve.get_deployment_handle(REPLICA_DEPLOYMENT, name)
        described: ReplicaDescription
        described = replicas.describe.remote().result(timeout_s=DESCRIBE_TIMEOUT_S)
        yield described
    finally:
        serve.delete(name)
