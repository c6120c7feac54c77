"""What a replica and the ingress do while Serve's handles raise: go on, whatever it is."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError, Metadata  # type: ignore[import-untyped]
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from magicdec.config import SchedulerConfig
from magicdec.deployments import replica, replica_report
from magicdec.deployments.errors import ApiError
from magicdec.deployments.ingress import Ingress
from magicdec.deployments.settings import load_settings
from magicdec.stats import EngineLoad

FAILURES = [
    AioRpcError(StatusCode.UNKNOWN, Metadata(), Metadata()),
    RuntimeError("the handle is closed"),
    RayServeException("the deployment is unavailable"),
    RayError("gone"),
]
LOAD = EngineLoad(0, 0, 10, 10)


class Handle:
    """Every method of it fails until `failures` have been raised, then gives `answer`."""

    def __init__(self, failures: list[Exception], answer: object = None) -> None:
        self._failures = list(failures)
        self._answer_given = answer
        self.num_answers = 0

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote: Callable[..., Awaitable[object]] = staticmethod(self._answer)

        return Method

    async def _answer(self, *arguments: object) -> object:
        if self._failures:
            raise self._failures.pop(0)
        self.num_answers += 1
        return self._answer_given

    def options(self, **options: object) -> "Handle":
        return self


class EngineLoopStub:
    is_alive = True

    def load(self) -> EngineLoad:
        return LOAD

    def take_policy(self) -> None:
        """Its plan is fixed."""


async def test_reports_outlive_every_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_report, "REPORT_PERIOD_S", 0.001)
    monkeypatch.setattr(replica_report, "LEAST_REPORT_PERIOD_S", 0.0)
    answer = replica_report.ReportAnswer(knew=True)
    router, engine_loop = Handle([*FAILURES, TimeoutError()], answer), EngineLoopStub()
    requests = replica_report.Requests(SchedulerConfig())
    reports = asyncio.create_task(
        replica.report_for_ever(cast(Any, router), "r", cast(Any, engine_loop), requests)
    )
    async with asyncio.timeout(5):
        while router.num_answers < 3:
            assert not reports.done()
            await asyncio.sleep(0.001)
    engine_loop.is_alive = False
    await reports


def ingress(path: Path, failures: list[Exception]) -> Ingress:
    settings = load_settings(None, {"model": {"path": str(path)}})
    return Ingress(settings, cast(Any, Handle(failures)), cast(Any, Handle(failures)))


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
async def test_health_falls_back(tiny_model_dir: Path, failure: Exception) -> None:
    response = await ingress(tiny_model_dir, [failure]).health()
    assert response.status_code == 200
    assert json.loads(bytes(response.body)) == {"status": "ok", "router": "unavailable"}


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
async def test_describe_falls_back(tiny_model_dir: Path, failure: Exception) -> None:
    with pytest.raises(ApiError) as caught:
        await ingress(tiny_model_dir, [failure]).complete(b"{}", "client")
    assert (caught.value.status, caught.value.code) == (503, "no_replica_available")
