"""Two served replicas that choose their drafts: what they learn is known to who comes next."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve

from magicdec.deployments.app import APP_NAME
from magicdec.deployments.replica_report import ReportAnswer
from magicdec.routing.settings import AdmissionStats
from tests.deployments.conftest import MODEL, AppFactory, ServedApp
from tests.magicdec.control.policies import counts
from tests.magicdec.routing.replicas import report

# Both replicas time their steps before they serve.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    chosen = {"draft_length": None, "draft_budget": None, "draft_budgets": (64, 128)}
    return run_app(num_replicas=2, speculation=chosen | {"max_draft_budget": 512})


def answer(app: ServedApp, number: int) -> int:
    """Tokens; the request's own wish makes sure that there are drafts to learn from."""
    wish = {"drafter": "recycled", "draft_length": 3, "draft_budget": 64}
    client = app.client()
    completion = client.completions.create(
        model=MODEL,
        prompt=f"{number} and {number} and {number}",
        max_tokens=200,
        extra_body={"speculation": wish, "ignore_eos": True},
    )
    assert completion.usage is not None
    return completion.usage.completion_tokens


def test_a_replica_that_is_new_is_told_what_the_served_ones_saw(app: ServedApp) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: answer(app, number), range(8))) == [200] * 8
    router = serve.get_deployment_handle("Router", APP_NAME)
    deadline, number = time.monotonic() + 20, 0
    known: dict[tuple[str, float, int, int], tuple[float, float]] = {}
    while not known:
        assert time.monotonic() < deadline, "nobody has told anything"
        time.sleep(0.5)
        number += 1
        leaving = report(draining=True)  # so nothing is sent to one that is none
        told: ReportAnswer = router.report.remote(f"new{number}", leaving).result(timeout_s=20)
        known = counts(told.policy)
    assert {drafter for drafter, *_ in known} == {"recycled"}
    assert sum(examined for examined, _ in known.values()) > 10
    stats: AdmissionStats = router.stats.remote().result(timeout_s=20)
    assert (stats.num_dropped_policies, stats.num_dropped_reports) == (0, 0)
