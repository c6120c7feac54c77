"""The router's decision over a clock that the test moves."""

from magicdec.admission import Admission, Assignment
from magicdec.stats import EngineLoad


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def load(free: int, *, waiting: int = 0, running: int = 0, total: int = 1000) -> EngineLoad:
    return EngineLoad(running, waiting, free, total)


def make(max_queued_requests: int = 8) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(clock, max_queued_requests=max_queued_requests), clock


def test_nobody_is_known_at_first() -> None:
    admission, _ = make()
    assert admission.assign(10) == Assignment(None)
    assert admission.live_replicas() == []


def test_room_comes_before_a_short_queue() -> None:
    admission, _ = make()
    admission.report("full", load(50))
    admission.report("roomy", load(400, running=5))
    assert admission.assign(100).replica_id == "roomy"


def test_most_free_cache_wins_among_equals() -> None:
    admission, _ = make()
    admission.report("a", load(400))
    admission.report("b", load(500))
    assert admission.assign(100).replica_id == "b"


def test_shortest_queue_where_nobody_has_room() -> None:
    admission, _ = make()
    admission.report("a", load(0, waiting=3))
    admission.report("b", load(0, waiting=1))
    assert admission.assign(100).replica_id == "b"


def test_a_burst_between_reports_is_spread() -> None:
    admission, _ = make()
    for name in ("a", "b"):
        admission.report(name, load(1000))
    chosen = [admission.assign(100).replica_id for _ in range(4)]
    assert sorted(str(c) for c in chosen) == ["a", "a", "b", "b"]


def test_debits_stay_until_a_later_report_holds_them() -> None:
    admission, clock = make()
    admission.report("a", load(1000))
    admission.report("b", load(900))
    assert admission.assign(800).replica_id == "a"
    clock.now += 0.1  # this report left before the assignment arrived
    admission.report("a", load(1000))
    admission.report("b", load(900))
    assert admission.assign(800).replica_id == "b"
    clock.now += 1.0
    admission.report("a", load(1000))
    admission.report("b", load(900))
    assert admission.assign(800).replica_id == "a"


def test_stale_replicas_are_dropped() -> None:
    admission, clock = make()
    admission.report("a", load(1000))
    clock.now += 2.0
    admission.report("b", load(10))
    clock.now += 1.5
    assert admission.live_replicas() == ["b"]
    assert admission.assign(5).replica_id == "b"


def test_dead_replicas_are_dropped_and_their_late_reports_ignored() -> None:
    admission, clock = make()
    admission.report("a", load(1000))
    admission.mark_dead("a")
    admission.report("a", load(1000))
    assert admission.assign(1).replica_id is None
    clock.now += 4.0  # wrongly accused: it still reports, so it is back
    admission.report("a", load(1000))
    assert admission.assign(1).replica_id == "a"


def test_excluded_replicas_are_not_chosen() -> None:
    admission, _ = make()
    admission.report("a", load(1000))
    admission.report("b", load(10))
    assert admission.assign(1, exclude=["a"]).replica_id == "b"
    assert admission.assign(1, exclude=["a", "b"]) == Assignment(None)


def test_a_full_queue_is_refused_with_a_time() -> None:
    admission, _ = make(max_queued_requests=2)
    admission.report("a", load(1000, waiting=2))
    refusal = admission.assign(1)
    assert refusal.replica_id is None
    assert refusal.retry_after_s is not None and refusal.retry_after_s > 0


def test_requests_that_do_not_wait_are_not_queued() -> None:
    admission, _ = make(max_queued_requests=2)
    admission.report("a", load(1000))
    assert [admission.assign(100).replica_id for _ in range(10)] == ["a"] * 10
    assert [admission.assign(100).replica_id for _ in range(3)] == ["a", "a", None]


def test_the_bound_refuses_nobody_who_has_room() -> None:
    admission, _ = make(max_queued_requests=2)
    admission.report("a", load(0, waiting=5))
    admission.report("b", load(100))
    assert admission.assign(100).replica_id == "b"
    assert admission.assign(100).retry_after_s is not None


def test_a_resumed_request_passes_a_full_queue() -> None:
    admission, _ = make(max_queued_requests=2)
    admission.report("a", load(0, waiting=2))
    assert admission.assign(1).replica_id is None
    assert admission.assign(1, resumed=True) == Assignment("a")
    assert admission.assign(1, ["a"], resumed=True) == Assignment(None)
