"""The engines of a batch job as stages of its Ray Data pipeline: the composition of both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from magicdec.deployments.app import REPLICA_DEPLOYMENT, ROUTER_DEPLOYMENT
from magicdec.deployments.batch_dataset import Stage
from magicdec.deployments.batch_engine_caller import EngineCaller, EngineTarget
from magicdec.deployments.batch_engines import engines, for_throughput, num_live_rows
from magicdec.deployments.settings import ServeSettings

MAX_CALLERS = 4  # processes: each carries hundreds of rows


@contextmanager
def engine_stages(
    settings: ServeSettings, app_name: str, *, max_live_rows: int | None, patience_s: float
) -> Iterator[tuple[Stage, Stage]]:
    """For many rows at a time, and for one. Raises StartFailed."""
    with engines(for_throughput(settings), app_name) as replica:
        target = EngineTarget(
            app_name=app_name,
            router=ROUTER_DEPLOYMENT,
            replicas=REPLICA_DEPLOYMENT,
            model_path=settings.model.path,
            model_name=settings.model.name,
            max_model_len=replica.max_model_len,
            vocab_size=replica.vocab_size,
            speculation=settings.engine_config().speculation,
            patience_s=patience_s,
        )
        num_live = max_live_rows or num_live_rows(settings)
        num_callers = min(settings.server.num_replicas, MAX_CALLERS, num_live)
        yield (
            Stage(EngineCaller, target, num_callers, num_live),
            Stage(EngineCaller, replace(target, alone=True), 1, 1),
        )
