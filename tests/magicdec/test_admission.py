"""What the router decides, over a clock that the test moves."""

import dataclasses
from typing import Any

import pytest

from magicdec.admission import Admission
from magicdec.config import ConfigError
from magicdec.routing.reports import FinishedRequest, LiveRequest
from magicdec.routing.settings import AdmissionConfig, Ask
from tests.magicdec.routing.replicas import Clock, report

HOLD_S = 0.05


def make(**changes: Any) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(clock, AdmissionConfig(**{"company_wait_s": HOLD_S, **changes})), clock


class Cluster:
    """An Admission with the replicas that were reported; `busy` ones run one request."""

    def __init__(self, *names: str, busy: bool = False, **changes: Any) -> None:
        self.admission, self.clock = make(**changes)
        self._number = 0
        for name in names:
            self.report(name, free=90_000, running=int(busy))

    def report(self, name: str, **fields: Any) -> None:
        self._number += 1
        self.admission.report(name, report(total=100_000, number=self._number, **fields))

    def ask(self, name: str, context: int = 300, max_tokens: int = 50, **fields: Any) -> None:
        assert self.admission.submit(Ask(name, context, max_tokens, **fields)) is None

    def release(self, after_s: float = 0.0) -> dict[str, str | None]:
        self.clock.now += after_s
        return {a.request_id: a.replica_id for a in self.admission.release()}


def test_an_idle_replica_gets_a_request_at_once() -> None:
    cluster = Cluster("a")
    cluster.report("a", free=100_000)
    cluster.ask("r")
    assert cluster.release() == {"r": "a"}


def test_requests_of_a_length_are_released_together_after_a_short_wait() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.report(name, free=90_000, running=1, max_batch_tokens=4096)
    cluster.ask("r1", 100)
    assert cluster.release() == {}
    assert cluster.admission.next_due() == pytest.approx(cluster.clock.now + HOLD_S)
    cluster.ask("longer", 600)
    cluster.clock.now += 0.04
    cluster.ask("r2", 120)
    assert cluster.release() == {}
    assert cluster.release(0.0101) == {"r1": "a", "r2": "a", "longer": "b"}


def test_company_that_fills_a_step_is_not_waited_for() -> None:
    cluster = Cluster("a", busy=True)
    for i in range(3):
        cluster.ask(f"r{i}", 250)
    assert cluster.release() == {"r0": "a", "r1": "a"}
    cluster.ask("fills it alone", 1500)
    assert cluster.release() == {"fills it alone": "a"}


def test_company_ends_where_the_step_is_full() -> None:
    cluster = Cluster("a", "b", busy=True)
    for i in range(4):
        cluster.ask(f"r{i}", 200)
    assert cluster.release(HOLD_S) == {"r0": "a", "r1": "a", "r2": "b", "r3": "b"}


def test_idle_replicas_are_all_used_before_company() -> None:
    cluster = Cluster()
    for i in range(4):
        cluster.ask(f"r{i}", 100)
    for name in ("a", "b"):
        cluster.report(name, free=100_000)
    assert set(cluster.release().values()) == {"a", "b"}


def test_without_length_classes_nobody_waits_for_company() -> None:
    cluster = Cluster("a", busy=True, length_classes=False)
    cluster.ask("r")
    assert cluster.release() == {"r": "a"}


def test_requests_wait_here_until_there_is_room() -> None:
    cluster = Cluster(busy=True)
    cluster.report("a", free=500, running=1)
    cluster.ask("r", 600)
    assert cluster.release(1.0) == {}
    cluster.report("a", free=700, running=1)
    assert cluster.release() == {"r": "a"}


def test_a_burst_between_reports_is_spread() -> None:
    cluster = Cluster("a", "b", busy=True)
    for i in range(4):
        cluster.ask(f"r{i}", 600)
    assert sorted(cluster.release(1.0).values(), key=str) == ["a", "a", "b", "b"]


def test_asking_again_keeps_the_place_and_gets_the_same_answer() -> None:
    cluster = Cluster()
    cluster.report("a", free=0, running=1)
    for name in ("r1", "r2", "r1"):
        cluster.ask(name, 600)
        cluster.release(0.5)
    cluster.report("a", free=700, running=1)
    assert cluster.release() == {"r1": "a"}
    again = cluster.admission.submit(Ask("r1", 600, 50))
    assert again is not None and again.replica_id == "a"
    assert cluster.release() == {}


def test_a_request_that_nobody_asks_about_is_given_up() -> None:
    cluster = Cluster(lease_s=2.0, report_timeout_s=60.0)
    cluster.report("a", free=0, running=1)
    cluster.ask("r1")
    cluster.clock.now += 1.5
    cluster.ask("r2")
    cluster.release(1.0)
    assert cluster.admission.stats().num_queued == 1
    assert cluster.admission.stats().num_abandoned == 1


def test_a_client_that_leaves_is_not_served() -> None:
    cluster = Cluster()
    cluster.report("a", free=0, running=1)
    cluster.ask("r")
    cluster.admission.cancel("r")
    cluster.admission.cancel("unknown")
    cluster.report("a", free=100_000)
    assert cluster.release() == {}


def test_a_long_request_is_not_passed_for_ever() -> None:
    """One replica, small requests whenever there is room for them: at the age bound it is kept."""
    cluster = Cluster(age_bound_s=3.0)
    cluster.report("a", free=1000, running=9)
    cluster.ask("long", 60_000)
    waited = 0.0
    for i in range(200):
        cluster.ask(f"small{i}", 300)
        sent = cluster.release(0.1)
        waited += 0.1
        if "long" in sent:
            break
        assert sent == {} or waited <= 3.0 + 0.1
        # What was sent is answered at once; the nine that run give back a little at a time.
        cluster.report("a", free=min(int(1000 + 20_000 * max(waited - 3.0, 0)), 100_000), running=9)
    assert 3.0 < waited < 7.0


def test_turns_go_by_the_tokens_that_a_key_was_served() -> None:
    cluster = Cluster(length_classes=False)
    cluster.report("a", free=0, running=1)
    for i in range(20):
        cluster.ask(f"x{i}", 300, key="x")
    for i in range(3):
        cluster.ask(f"y{i}", 300, key="y")
    cluster.report("a", free=2000, running=1)
    assert sorted(cluster.release()) == ["x0", "x1", "x2", "y0", "y1"]


def test_a_charge_is_set_right_when_the_answer_is_known() -> None:
    cluster = Cluster(length_classes=False)
    cluster.report("a", free=100_000)
    for name in ("x0", "y0"):
        cluster.ask(name, 300, 4000, key=name[0])
    assert len(cluster.release()) == 2
    ended = FinishedRequest("x0", 300, 10, 4000)
    live = (LiveRequest("y0", 0, 4000),)
    cluster.report("a", free=0, running=1, live=live, finished=(ended,))
    for name in ("y1", "x1"):
        cluster.ask(name, 300, key=name[0])
    cluster.report("a", free=400, running=1)
    assert cluster.release() == {"x1": "a"}


def test_a_full_queue_refuses_the_newest_with_a_time() -> None:
    cluster = Cluster(max_queued_requests=2)
    cluster.report("a", free=0, running=1)
    for i in range(3):
        cluster.ask(f"r{i}")
    (refusal,) = cluster.admission.release()
    assert refusal.request_id == "r2" and refusal.replica_id is None
    assert refusal.retry_after_s == 5.0  # nothing was measured yet
    assert cluster.admission.stats().num_refused == 1


def test_a_crowd_of_one_key_keeps_nobody_else_out() -> None:
    cluster = Cluster(max_queued_requests=3)
    cluster.report("a", free=0, running=1)
    for i in range(3):
        cluster.ask(f"x{i}", key="x")
    cluster.ask("y0", key="y")
    assert cluster.release() == {"x2": None}


def test_retry_after_follows_the_measured_drain() -> None:
    cluster = Cluster(max_queued_requests=8, length_classes=False)
    for second in range(30):
        cluster.ask(f"r{second}", 1000)
        ended = FinishedRequest(f"r{second - 1}", 900, 100, 100)
        cluster.report("a", free=100_000, finished=(ended,))
        cluster.release(1.0)
    cluster.report("a", free=0, running=1)
    for i in range(9):
        cluster.ask(f"late{i}", 2000)
    (refusal,) = cluster.admission.release()
    # Eight times some 2,030 tokens at some 1,000 a second.
    assert refusal.retry_after_s == pytest.approx(16.2, rel=0.1)


def test_a_resumed_request_passes_the_queue_and_its_bound() -> None:
    cluster = Cluster(max_queued_requests=2)
    cluster.report("a", free=0, running=1)
    for i in range(2):
        cluster.ask(f"r{i}", 600)
    cluster.ask("resumed", 600, resumed=True)
    assert cluster.release() == {"r1": None}
    cluster.report("a", free=700, running=1)
    assert cluster.release() == {"resumed": "a"}


def test_nobody_known_means_the_cluster_chooses_after_a_while() -> None:
    admission, clock = make()
    admission.submit(Ask("r", 10, 10))
    assert admission.release() == []
    clock.now += 2.0
    (answer,) = admission.release()
    assert (answer.replica_id, answer.retry_after_s) == (None, None)


def test_a_request_that_may_go_nowhere_is_left_to_the_cluster() -> None:
    cluster = Cluster("a")
    cluster.ask("r", exclude=("a",))
    assert cluster.release(1.0) == {"r": None}


def test_excluded_replicas_are_not_chosen() -> None:
    cluster = Cluster("a", "b")
    cluster.report("b", free=50_000, running=1)
    cluster.ask("r", exclude=("a",))
    assert cluster.release(1.0) == {"r": "b"}


def test_silent_and_dead_replicas_get_nothing() -> None:
    cluster = Cluster("a")
    cluster.clock.now += 2.0
    cluster.report("b", free=10_000, running=1)
    cluster.clock.now += 1.5
    assert cluster.admission.live_replicas() == ["b"]
    cluster.admission.mark_dead("b")
    cluster.report("b", free=100_000)
    assert cluster.admission.live_replicas() == []
    cluster.clock.now += 4.0  # wrongly accused: it still reports, so it is back
    cluster.report("b", free=100_000)
    cluster.ask("r")
    assert cluster.release() == {"r": "b"}


def test_draining_replicas_get_nothing_new() -> None:
    cluster = Cluster("a", "b")
    cluster.report("a", free=100_000, draining=True)
    cluster.ask("r")
    assert cluster.release(1.0) == {"r": "b"}


def test_absurd_reports_count_as_silence() -> None:
    cluster = Cluster("a", busy=True)
    state = cluster.admission.replica("a")
    assert state is not None
    before = dataclasses.replace(state)
    wrong = dataclasses.replace(report(), max_num_seqs=0)
    assert not cluster.admission.report("a", wrong)
    assert cluster.admission.stats().num_dropped_reports == 1
    assert dataclasses.replace(state) == before or state.report == before.report
    cluster.clock.now += 3.0
    assert not cluster.admission.report("a", wrong)
    assert cluster.admission.live_replicas() == []


def test_a_new_router_knows_prefixes_from_the_first_reports() -> None:
    cluster = Cluster("a", busy=True)
    cluster.report("b", free=80_000, running=1, prefixes=((1, 2), (7, 8, 9)))
    cluster.ask("r", 1000, prefix_hashes=(7, 8, 9))
    (answer,) = cluster.admission.release()
    assert (answer.replica_id, answer.num_cached_tokens) == ("b", 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_queued_requests": 0}, "max_queued_requests must be at least 1, got 0"),
        ({"company_wait_s": -1.0}, "company_wait_s must be at least 0, got -1.0"),
        ({"age_bound_s": 0.01}, "age_bound_s must be at least 0.02, got 0.01"),
        ({"overload_factor": 0.5}, "overload_factor must be at least 1, got 0.5"),
        ({"overload_factor": float("nan")}, "overload_factor must be at least 1, got nan"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdmissionConfig(**changes)
    assert str(caught.value) == message
