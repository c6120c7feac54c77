"""The Router: one actor that knows every replica's load and says which one takes a request.

Off the token path: the ingress asks it once a request. If it is away, the ingress lets Serve
choose, and a new Router knows every replica again after one report period.
"""

import logging
import time

from magicdec.admission import Admission, Assignment
from magicdec.stats import EngineLoad

logger = logging.getLogger(__name__)


class Router:
    """A thin actor around `Admission`, which holds the decision. One replica, one event loop."""

    def __init__(self, max_queued_requests: int) -> None:
        self._admission = Admission(time.monotonic, max_queued_requests=max_queued_requests)

    async def report(self, replica_id: str, load: EngineLoad) -> None:
        self._admission.report(replica_id, load)

    async def mark_dead(self, replica_id: str) -> None:
        logger.warning("replica %s was reported dead", replica_id)
        self._admission.mark_dead(replica_id)

    async def assign(
        self, num_tokens: int, exclude: tuple[str, ...], *, resumed: bool = False
    ) -> Assignment:
        """`num_tokens`: prompt and output together, the most KV that the request can hold."""
        return self._admission.assign(num_tokens, exclude, resumed=resumed)

    async def live_replicas(self) -> list[str]:
        return self._admission.live_replicas()
