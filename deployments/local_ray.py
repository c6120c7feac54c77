"""Ray and Serve on this machine, for as long as this process runs."""

import logging
import os
import socket

from magicdec.deployments.settings import ServerSettings, SettingsError

# Calls between Serve's processes by gRPC instead of Ray's object store: an item of a stream costs
# half the CPU in each process that it passes. The workers inherit these, and must not draw progress
# bars into their logs. Must be set before Ray is imported and started.
ENVIRONMENT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Serve's controller looks ten times a second by default: 5 % of a core, on a laptop the
    # engine's. Replicas are still watched by their own health checks.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1.0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}

# Tells at every start that Ray's token authentication is on, which is what we want.
AUTHENTICATION_LOGGER = "ray._private.authentication.authentication_token_setup"

# Logical CPUs only admit actors; on a laptop their number must never be what stops a start.
LOGICAL_CPUS = 64
PROXY_HEAD_ONLY = "HeadOnly"


def start_local_ray(server: ServerSettings, *, show_worker_logs: bool) -> None:
    """A fresh cluster of one node and Serve's HTTP proxy on it; never joins another cluster.

    Raises SettingsError when the port is taken.
    """
    check_port(server.host, server.port)
    init_local_ray(show_worker_logs=show_worker_logs)
    from ray import serve
    from ray.serve.config import HTTPOptions

    http = HTTPOptions(host=server.host, port=server.port)
    serve.start(proxy_location=PROXY_HEAD_ONLY, http_options=http)


def init_local_ray(*, show_worker_logs: bool) -> None:
    """The cluster alone. It ends with this process, however that ends."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not show_worker_logs:
        quiet_loggers()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=LOGICAL_CPUS,
        log_to_driver=show_worker_logs,
        logging_level=logging.WARNING,
    )


def quiet_loggers() -> None:
    """Of Ray's Python side, warnings alone; after its import, which sets the level of Serve's."""
    import ray.serve

    logging.getLogger(ray.serve.__name__).setLevel(logging.WARNING)
    logging.getLogger(AUTHENTICATION_LOGGER).setLevel(logging.ERROR)


def check_port(host: str, port: int) -> None:
    """Raises SettingsError when nothing can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(f"cannot listen on {host}:{port}: {reason.lower()}") from error
