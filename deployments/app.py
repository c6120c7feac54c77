"""The composition root: settings in, Serve application out. Only this constructs across layers."""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.deployment import Application, Deployment
from ray.serve.schema import LoggingConfig

from magicdec.cluster.placement import replica_bundles
from magicdec.deployments.autoscaling import POLICY
from magicdec.deployments.ingress import Ingress
from magicdec.deployments.pinned_router import PinnedRequestRouter
from magicdec.deployments.replica import EngineReplica
from magicdec.deployments.settings import ServerSettings, ServeSettings, parse_settings
from magicdec.deployments.watched_router import WatchedRouter

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
    router, replicas = _engines(settings)
    return _ingress(settings).bind(settings, router, replicas)


def build_engines(settings: ServeSettings) -> Application:
    """The same without HTTP: for a job that asks router and replicas itself."""
    return _engines(settings)[1]


def _engines(settings: ServeSettings) -> tuple[Application, Application]:
    """Router and replicas."""
    name = settings.model.name
    router = _router().bind(settings.admission_config(), name)
    drain_file = settings.server.drain_file
    replicas = _replicas(settings).bind(settings.engine_config(), router, name, drain_file)
    return router, replicas


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
    return configure(WatchedRouter)


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
        max_ongoing_requests=UNLIMITED_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        graceful_shutdown_timeout_s=settings.server.drain_timeout_s,
        health_check_period_s=2,
        logging_config=_QUIET,
        request_router_config={"request_router_class": PinnedRequestRouter},
        **options,
        **_number_of_replicas(settings.server),
    )
    return configure(EngineReplica)


def _number_of_replicas(server: ServerSettings) -> dict[str, Any]:
    scaling = server.autoscaling
    if scaling is None:
        return {"num_replicas": server.num_replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function=POLICY, policy_kwargs={"target_usage": scaling.target_kv_usage}
    )
    config = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        look_back_period_s=scaling.look_back_s,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        policy=policy,
    )
    return {"autoscaling_config": config}


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
