"""The two applications that the router benchmark compares: all but the choice is the same."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import Any, cast
from unittest import mock

from ray import serve
from ray.serve.config import RequestRouterConfig

from magicdec.deployments import app
from magicdec.deployments.replica import EngineReplica
from magicdec.deployments.replica_api import Admitted
from magicdec.deployments.settings import ServeSettings
from magicdec.deployments.watched_router import WatchedRouter
from magicdec.routing.settings import AdmissionStats, Ask, Assignment
from magicdec.types import Request, RequestOutput
from tests.benchmarks.bench_router_client import Call, Client
from tests.benchmarks.bench_router_records import SERVE

Items = AsyncGenerator[Admitted | RequestOutput, None]

_WARM_UP_SEED = 1_000_000  # above every request's number
_WARM_UP_ROUNDS = 5  # at most
_SETTLE_S = 1.5  # for the last reports of the warm-up
_ANSWER_S = 60.0


class UndecidedRouter(WatchedRouter):
    """Leaves every request to Serve, at once. It takes the reports, as the real one does."""

    async def assign(self, ask: Ask, wait_s: float) -> Assignment | None:
        return Assignment(ask.request_id, None)


class ObservedReplica(EngineReplica):
    """Notes when each request reached it, by seed: which of the client's requests it is."""

    def __init__(self, *bound: Any) -> None:
        """As the application binds EngineReplica."""
        super().__init__(*bound)
        self._arrivals: dict[int, float] = {}

    async def generate(
        self,
        request: Request,
        target: str | None = None,
        prefix_hashes: tuple[int, ...] = (),
    ) -> Items:
        self._arrivals[request.sampling.seed] = time.monotonic()
        items = cast(Items, super().generate(request, target, prefix_hashes))
        async with aclosing(items):
            async for item in items:
                yield item

    async def arrivals(self) -> tuple[str, dict[int, float]]:
        """Its id, and seed -> when the request came; the clock is the same in all processes."""
        return self._replica_id, self._arrivals


class BenchedApp:
    """One of the applications, running."""

    def __init__(self, settings: ServeSettings, timeout_s: float) -> None:
        server = settings.server
        self.client = Client(f"http://{server.host}:{server.port}", settings.model.name, timeout_s)
        self._num_replicas = server.num_replicas
        self._replicas = serve.get_deployment_handle(app.REPLICA_DEPLOYMENT, app.APP_NAME)
        self._router = serve.get_deployment_handle("Router", app.APP_NAME)

    def warm_up(self, token_ids: Sequence[int], num_tokens: int, max_tokens: int) -> None:
        """Until every replica has answered. Each prompt is other text. Raises RuntimeError."""
        count = 2 * self._num_replicas
        for i in range(_WARM_UP_ROUNDS):
            starts = [(i * count + j) * num_tokens for j in range(count)]
            prompts = [tuple(token_ids[start : start + num_tokens]) for start in starts]
            calls = [
                Call(_WARM_UP_SEED + start, prompt, max_tokens)
                for start, prompt in zip(starts, prompts, strict=True)
            ]
            answers = self.client.closed_loop(calls, count)
            errors = [answer.error for answer in answers if answer.error is not None]
            if errors:
                raise RuntimeError(f"a warm-up request failed: {errors[0]}")
            if len({replica for replica, _ in self.arrivals().values()}) == self._num_replicas:
                time.sleep(_SETTLE_S)
                return
        raise RuntimeError(f"a replica had no request in {_WARM_UP_ROUNDS} rounds of warm-up")

    def arrivals(self) -> dict[int, tuple[str, float]]:
        """Request number -> replica, and when it came there."""
        found: list[tuple[str, dict[int, float]]]
        found = self._replicas.broadcast("arrivals").results(timeout_s=_ANSWER_S)
        return {
            number: (replica_id, at)
            for replica_id, arrivals in sorted(found)
            for number, at in arrivals.items()
        }

    def router_stats(self) -> dict[str, Any]:
        stats: AdmissionStats = self._router.stats.remote().result(timeout_s=_ANSWER_S)
        return asdict(stats)


@contextmanager
def deployed(settings: ServeSettings, arm: str, timeout_s: float) -> Iterator[BenchedApp]:
    """A fresh application: its replicas have cached nothing. `timeout_s`: of a client's request."""
    replaced: dict[str, Any] = {"EngineReplica": ObservedReplica}
    if arm == SERVE:
        replaced["WatchedRouter"] = UndecidedRouter
        # Serve's own: two choices at random, the shorter queue.
        replaced["PinnedRequestRouter"] = RequestRouterConfig().request_router_class
    with mock.patch.multiple(app, **replaced):
        application = app.build(settings)
    serve.run(application, name=app.APP_NAME)
    try:
        yield BenchedApp(settings, timeout_s)
    finally:
        serve.delete(app.APP_NAME)
