"""The composition root: settings in, Serve application out. Only this constructs across layers."""

from typing import Any

from ray import serve
from ray.serve.deployment import Application, Deployment
from ray.serve.schema import LoggingConfig

from magicdec.cluster.placement import replica_bundles
from magicdec.deployments.ingress import Ingress
from magicdec.deployments.pinned_router import PinnedRequestRouter
from magicdec.deployments.replica import EngineReplica
from magicdec.deployments.router import Router
from magicdec.deployments.settings import ServeSettings, parse_settings

APP_NAME = "magicdec"
REPLICA_DEPLOYMENT = "EngineReplica"
ROUTER_DEPLOYMENT = "Router"

# The router queues by KV tokens and bounds the queue: Serve's own limits stay out of it.
UNLIMITED_REQUESTS = 1_000_000
# A broken setting fails at once instead of after Serve's default of 20 attempts.
CONSTRUCTOR_ATTEMPTS = 3

# The router is sent some reports a second by every replica: no line for each.
_QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


def build(settings: ServeSettings) -> Application:
    """Ingress -> Router and EngineReplica; the replicas report to the router."""
    router = _router().bind(settings.admission_config())
    replicas = _replicas(settings).bind(settings.engine_config(), router)
    return _ingress(settings).bind(settings, router, replicas)


def build_engines(settings: ServeSettings) -> Application:
    """The same without HTTP: for a job that asks router and replicas itself."""
    router = _router().bind(settings.admission_config())
    return _replicas(settings).bind(settings.engine_config(), router)


def app_builder(args: dict[str, Any]) -> Application:
    """For Serve configs and `serve run`: args are the sections of the YAML settings file."""
    return build(parse_settings(args))


def _router() -> Deployment:
    """One replica: it is the only place that sees every assignment."""
    configure = serve.deployment(
        name=ROUTER_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=UNLIMITED_REQUESTS,
        graceful_shutdown_timeout_s=1,
        health_check_period_s=2,
        logging_config=_QUIET,
    )
    return configure(Router)


def _replicas(settings: ServeSettings) -> Deployment:
    config = settings.engine_config()
    bundles = replica_bundles(config, use_gpu=settings.parallel.use_gpu)
    options: dict[str, Any] = {}
    if len(bundles) == 1:  # one rank, in the replica's own process: no group to place
        bundle = bundles[0]
        options["ray_actor_options"] = {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
        }
    else:  # the ranks talk at every layer: on one node or not at all
        options["placement_group_bundles"] = bundles
        options["placement_group_strategy"] = "STRICT_PACK"
        options["ray_actor_options"] = {"num_cpus": bundles[0]["CPU"]}
    configure = serve.deployment(
        name=REPLICA_DEPLOYMENT,
        num_replicas=settings.server.num_replicas,
        max_ongoing_requests=UNLIMITED_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        graceful_shutdown_timeout_s=settings.server.drain_timeout_s,
        health_check_period_s=2,
        logging_config=_QUIET,
        request_router_config={"request_router_class": PinnedRequestRouter},
        **options,
    )
    return configure(EngineReplica)


def _ingress(settings: ServeSettings) -> Deployment:
    configure = serve.deployment(
        name="Ingress",
        num_replicas=settings.server.num_ingress_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=UNLIMITED_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        graceful_shutdown_timeout_s=settings.server.drain_timeout_s,
        health_check_period_s=2,
        logging_config=_QUIET,
    )
    return configure(serve.ingress()(Ingress))
