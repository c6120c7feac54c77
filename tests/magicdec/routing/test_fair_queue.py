"""Turns, order and company in the queue, without replicas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.fair_queue import FairQueue
from magicdec.routing.settings import Ask
from magicdec.routing.waiting import Waiting, length_class

SLACK = 100


def waiting(
    name: str,
    key: str = "x",
    context: int = 300,
    *,
    at: float = 0.0,
    bound_s: float = 10.0,
    resumed: bool = False,
    exclude: tuple[str, ...] = (),
) -> Waiting:
    ask = Ask(name, context, 1, key, resumed=resumed, exclude=exclude)
    return Waiting.of(ask, 0, at, bound_s)


def filled(*requests: Waiting) -> FairQueue:
    queue = FairQueue(SLACK)
    for request in requests:
        queue.add(request)
    return queue


def serve(queue: FairQueue) -> Waiting:
    """The first offer of the first turn."""
    first = queue.offers(queue.turns()[0])[0]
    queue.charge(first.key, first.num_tokens)
    queue.remove(first.request_id)
    return first


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 8), (1, 8), (255, 8), (256, 8), (511, 8), (512, 9), (1023, 9), (1024, 10), (131072, 17)],
)
def test_length_classes_are_powers_of_two(num_tokens: int, expected: int) -> None:
    assert length_class(num_tokens) == expected


def test_a_key_is_served_in_order_of_arrival() -> None:
    queue = filled(waiting("a", at=1.0), waiting("b", at=2.0), waiting("c", at=3.0))
    assert [serve(queue).request_id for _ in range(3)] == ["a", "b", "c"]


def test_what_waited_elsewhere_counts() -> None:
    queue = filled(waiting("new", at=5.0, bound_s=10.0), waiting("moved", at=6.0, bound_s=2.0))
    assert serve(queue).request_id == "moved"


def test_a_resumed_request_goes_first() -> None:
    queue = filled(waiting("old", at=0.0), waiting("resumed", at=5.0, resumed=True))
    assert serve(queue).request_id == "resumed"


def test_one_request_of_each_class_is_offered() -> None:
    queue = filled(
        waiting("a", context=300, at=0.0),
        waiting("b", context=300, at=1.0),
        waiting("c", context=3000, at=2.0),
        waiting("d", context=300, at=3.0, exclude=("r",)),
    )
    assert [w.request_id for w in queue.offers("x")] == ["a", "c", "d"]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=30, max_size=60)
)
def test_two_keys_that_always_wait_get_the_same(sizes: list[tuple[int, int]]) -> None:
    """Whatever their requests hold: they are apart by no more than the largest of them."""
    queue = FairQueue(SLACK)
    for i, (x, y) in enumerate(sizes):
        queue.add(waiting(f"x{i}", "x", x))
        queue.add(waiting(f"y{i}", "y", y))
    served = {"x": 0, "y": 0}
    while len(queue.turns()) == 2:
        request = serve(queue)
        served[request.key] += request.num_tokens
        assert abs(served["x"] - served["y"]) <= 900


def test_idle_time_saves_nothing_up() -> None:
    queue = filled(*(waiting(f"x{i}", "x") for i in range(10)))
    for _ in range(6):
        serve(queue)
    for i in range(4):
        queue.add(waiting(f"y{i}", "y"))
    assert [serve(queue).key for _ in range(6)].count("y") == 3


def test_an_empty_queue_does_not_forget_who_was_ahead() -> None:
    queue = filled(waiting("x1", "x", 500), waiting("y1", "y", 100))
    serve(queue)
    serve(queue)
    queue.add(waiting("y2", "y"))
    queue.add(waiting("x2", "x", at=-1.0))
    assert queue.turns() == ["y", "x"]


def test_a_charge_can_be_set_right() -> None:
    queue = filled(*(waiting(f"{key}{i}", key) for key in "xy" for i in range(3)))
    assert [serve(queue).key for _ in range(2)] == ["x", "y"]
    queue.charge("y", -200)  # its answer was shorter than expected
    assert serve(queue).key == "y"
    queue.charge("nobody", 100)
    assert queue.turns() == ["x", "y"]


def test_lag_is_the_distance_to_the_key_served_most() -> None:
    queue = filled(*(waiting(f"{key}{i}", key) for key in "xy" for i in range(3)))
    serve(queue)
    assert (queue.lag("x"), queue.lag("y")) == (0, 300)


def company(queue: FairQueue, length: int, now: float) -> list[str]:
    names = []
    for request in queue.company(length, now):
        queue.charge(request.key, request.num_tokens)
        names.append(queue.remove(request.request_id).request_id)
    return names


def test_company_is_of_the_same_class() -> None:
    queue = filled(waiting("a", context=20), waiting("b", context=3000), waiting("c", context=30))
    assert company(queue, 8, now=1.0) == ["a", "c"]


def test_company_runs_ahead_of_its_turn_by_the_slack_at_most() -> None:
    queue = filled(
        waiting("y0", "y", context=3000), *(waiting(f"x{i}", "x", context=30) for i in range(9))
    )
    assert company(queue, 8, now=1.0) == ["x0", "x1", "x2", "x3"]  # 4 * 30 is above 100


def test_company_does_not_pass_one_of_its_key_beyond_the_age_bound() -> None:
    long, short = waiting("long", context=3000, at=0.0), waiting("short", context=20, at=5.0)
    assert company(filled(long, short), 8, now=9.0) == ["short"]
    assert company(filled(waiting("l", context=3000), waiting("s", context=20)), 8, now=11.0) == []


def test_company_that_may_not_go_is_passed() -> None:
    queue = filled(waiting("a", "x", 20), waiting("b", "y", 20))
    seen = [request.request_id for request in queue.company(8, 1.0)]
    assert seen == ["a", "b"] and len(queue) == 2


def test_the_newest_of_the_largest_crowd_leaves() -> None:
    queue = filled(
        waiting("y1", "y"), *(waiting(f"x{i}", "x") for i in range(3)), waiting("y2", "y")
    )
    victim = queue.victim()
    assert victim is not None and victim.request_id == "x2"


def test_a_resumed_request_never_leaves() -> None:
    only = filled(waiting("x0", "x", resumed=True), waiting("x1", "x", resumed=True))
    assert only.victim() is None
    only.add(waiting("y0", "y"))
    victim = only.victim()
    assert victim is not None and victim.request_id == "y0"
    assert FairQueue(SLACK).victim() is None


def test_a_request_waits_once() -> None:
    queue = filled(waiting("a"))
    with pytest.raises(ValueError, match="a waits already"):
        queue.add(waiting("a"))
    queue.remove("a")
    with pytest.raises(KeyError):
        queue.remove("a")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5000)), max_size=60))
def test_counts_follow_what_waits(arrivals: list[tuple[str, int]]) -> None:
    queue = FairQueue(SLACK)
    for i, (key, context) in enumerate(arrivals):
        queue.add(waiting(str(i), key, context))
        if i % 3 == 2:
            serve(queue)
        left = list(queue)
        assert len(queue) == len(left)
        assert queue.num_tokens == sum(w.num_tokens for w in left)
        assert set(queue.turns()) == {w.key for w in left}
        for length in range(8, 14):
            tokens = sum(w.num_context_tokens for w in left if w.length_class == length)
            assert queue.class_tokens(length) == tokens


def test_keys_that_come_once_are_forgotten() -> None:
    queue = FairQueue(SLACK)
    for i in range(500):
        queue.add(waiting(str(i), f"key{i}"))
        serve(queue)
    assert queue.num_known_keys < 100
