"""Where a request goes: cached prefix, its own length, least busy; within the overload limit."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.placement import Place, Placement
from magicdec.routing.prefix_affinity import PrefixAffinity
from magicdec.routing.replica import Debit, Replica
from magicdec.routing.replica_table import ReplicaTable
from magicdec.routing.settings import Ask
from magicdec.routing.traffic import OutputEstimate
from magicdec.routing.waiting import Waiting
from tests.magicdec.routing.replicas import report

TOTAL = 100_000
FACTOR = 1.5
PREFIX = (1, 2, 3, 4, 5)  # 2,048 tokens


class World:
    def __init__(self, **changes: Any) -> None:
        self.table = ReplicaTable(OutputEstimate(), report_timeout_s=3.0, debit_timeout_s=5.0)
        self.affinity = PrefixAffinity(1000)
        options = {"length_classes": True, "overload_factor": FACTOR, **changes}
        affinity = self.affinity if options.pop("prefix_affinity", True) else None
        self.placement = Placement(self.table, affinity, **options)

    def replica(self, name: str, *, held: int = 0, prefill: int = 0, length: int = 8) -> Replica:
        free, running = TOTAL - held, int(held + prefill > 0)
        self.table.report(name, report(free, total=TOTAL, running=running, prefill=prefill), 0.0)
        replica = self.table.get(name)
        assert replica is not None
        if running:
            self.table.send(replica, Debit(f"at {name}", "x", 1, 0, 0.0), length)
        return replica

    def choose(self, request: Waiting) -> Place | None:
        return self.placement.choose(request)


def asks(context: int = 3000, prefix: tuple[int, ...] = PREFIX, **fields: Any) -> Waiting:
    return Waiting.of(Ask("r", context, 1, prefix_hashes=prefix, **fields), 100, 0.0, 10.0)


def chosen(world: World, request: Waiting) -> str | None:
    place = world.choose(request)
    return None if place is None else place.replica.replica_id


def test_the_least_busy_takes_what_nobody_has_seen() -> None:
    world = World()
    world.replica("a", held=5000, length=15)
    world.replica("b", held=4000, length=15)
    assert chosen(world, asks()) == "b"


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    world = World()
    world.replica("a", held=30_000, length=15)
    world.replica("b", length=15)
    world.affinity.record("a", PREFIX, 2048)
    place = world.choose(asks())
    assert place is not None
    assert (place.replica.replica_id, place.num_cached_tokens) == ("a", 2048)


def test_not_where_that_would_overload() -> None:
    world = World(overload_factor=1.2)
    world.replica("a", held=30_000, prefill=8 * 512 - 1100, length=15)
    world.replica("b", length=15)
    world.affinity.record("a", PREFIX, 2048)
    place = world.choose(asks())
    assert place is not None
    assert (place.replica.replica_id, place.num_cached_tokens) == ("b", 0)


def test_of_those_that_have_it_the_least_busy() -> None:
    world = World()
    world.replica("a", held=30_000, length=15)
    world.replica("b", held=10_000, length=15)
    for name in ("a", "b"):
        world.affinity.record(name, PREFIX, 2048)
    assert chosen(world, asks()) == "b"


def test_without_affinity_prompts_are_not_compared() -> None:
    world = World(prefix_affinity=False)
    world.replica("a", held=30_000, length=15)
    world.replica("b", length=15)
    world.affinity.record("a", PREFIX, 2048)
    place = world.choose(asks())
    assert place is not None
    assert (place.replica.replica_id, place.num_cached_tokens) == ("b", 0)


def test_requests_of_like_length_go_together() -> None:
    world = World()
    world.replica("short", held=4000, length=8)
    world.replica("long", held=8000, length=11)
    assert chosen(world, asks(3000, ())) == "long"
    assert chosen(world, asks(300, ())) == "short"
    separate = World(length_classes=False)
    separate.replica("short", held=4000, length=8)
    separate.replica("long", held=8000, length=11)
    assert chosen(separate, asks(3000, ())) == "short"


def test_not_together_while_a_replica_idles() -> None:
    world = World()
    world.replica("long", held=1000, length=11)
    world.replica("idle")
    assert chosen(world, asks(3000, ())) == "idle"


def test_no_room_is_no_place() -> None:
    world = World()
    world.replica("a", held=98_000)
    assert chosen(world, asks()) is None
    assert chosen(World(), asks()) is None


def test_another_home_is_told_from_this_one() -> None:
    world = World()
    a, b = world.replica("a"), world.replica("b")
    assert not world.placement.has_other_home(asks(), a)
    world.affinity.record("a", PREFIX, 2048)
    assert not world.placement.has_other_home(asks(), a)
    assert world.placement.has_other_home(asks(), b)


@given(
    replicas=st.lists(
        st.tuples(
            st.integers(0, TOTAL), st.integers(0, 5000), st.booleans(), st.sampled_from([8, 11])
        ),
        min_size=1,
        max_size=8,
    ),
    context=st.integers(2048, 8000),
    factor=st.floats(1.0, 4.0),
)
def test_no_reason_overloads_a_replica(
    replicas: list[tuple[int, int, bool, int]], context: int, factor: float
) -> None:
    """The chosen one with the request is never busier than the factor allows, unless the less busy
    ones have no room for it."""
    world = World(overload_factor=factor)
    for i, (held, prefill, cached, length) in enumerate(replicas):
        world.replica(f"r{i}", held=held, prefill=prefill, length=length)
        if cached:
            world.affinity.record(f"r{i}", PREFIX, 2048)
    request = asks(context)
    place = world.choose(request)
    fitting = [r for r in world.table.ranked("r", ()) if r.fits(request.num_tokens, context)]
    if place is None:
        assert not fitting
        return
    new = context - place.num_cached_tokens
    assert place.replica.fits(request.num_tokens, new)
    loads = [r.load_with(request.num_tokens, context) for r in fitting]
    limit = factor * min(loads) if loads else float("inf")
    assert place.replica.load_with(request.num_tokens, new) <= limit + 1e-9
