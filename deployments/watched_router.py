"""The Router as it is served: once a second it tells Prometheus what it decided and who waits."""

import asyncio

from ray import serve

from magicdec.cluster.metric_table import ROUTER_METRICS
from magicdec.cluster.telemetry import (
    PUBLISH_PERIOD_S,
    Recorder,
    RouterTelemetry,
    common_labels,
)
from magicdec.deployments.router import Router
from magicdec.routing.settings import AdmissionConfig


class WatchedRouter(Router):
    """One replica, one event loop; see Router."""

    def __init__(self, config: AdmissionConfig, model_name: str) -> None:
        super().__init__(config)
        replica_id = serve.get_replica_context().replica_id.unique_id
        recorder = Recorder(ROUTER_METRICS, common_labels(model_name, replica_id))
        self._publishing = asyncio.create_task(self._publish_for_ever(RouterTelemetry(recorder)))

    async def _publish_for_ever(self, telemetry: RouterTelemetry) -> None:
        while True:
            telemetry.publish(await self.stats())
            await asyncio.sleep(PUBLISH_PERIOD_S)
