"""What is known of replicas: reports, debits, deaths, and the order for the next request."""

from typing import Any

import pytest

from magicdec.routing.replica import MAX_PREFILL_STEPS, Debit, Replica
from magicdec.routing.replica_table import ReplicaTable
from magicdec.routing.reports import FinishedRequest, LiveRequest
from magicdec.routing.traffic import OutputEstimate
from tests.magicdec.routing.replicas import report


def make() -> ReplicaTable:
    return ReplicaTable(OutputEstimate(), report_timeout_s=3.0, debit_timeout_s=5.0)


def known(table: ReplicaTable, name: str, now: float = 0.0, **fields: Any) -> Replica:
    table.report(name, report(**fields), now)
    replica = table.get(name)
    assert replica is not None
    return replica


def send(
    table: ReplicaTable, replica: Replica, name: str, num_tokens: int, at: float = 0.0
) -> None:
    table.send(replica, Debit(name, "x", num_tokens, num_tokens, at), 8)


def order(table: ReplicaTable) -> list[str]:
    return [replica.replica_id for replica in table.ranked("r", ())]


def test_answers_that_still_grow_are_committed() -> None:
    live = (LiveRequest("r", 10, 60), LiveRequest("s", 0, 40))
    replica = known(make(), "a", free=700, running=2, live=live)
    assert replica.committed_tokens == 300 + 50 + 40
    assert replica.free_tokens == 610


def test_what_waits_in_a_replica_is_committed_too() -> None:
    table = make()
    loaded = report(free=700, running=1, waiting=1)
    table.report("a", loaded, 0.0)
    replica = table.get("a")
    assert replica is not None and (replica.committed_tokens, replica.num_seqs) == (300, 2)


def test_a_debit_lasts_until_a_report_has_the_request() -> None:
    table = make()
    replica = known(table, "a")
    send(table, replica, "r", 400)
    assert (replica.free_tokens, replica.num_seqs, replica.num_prefill_tokens) == (600, 1, 400)
    known(table, "a", 1.0, number=1)  # left before the request came
    assert replica.free_tokens == 600 and table.sent_to("r") == "a"
    live = (LiveRequest("r", 0, 50),)
    known(table, "a", 2.0, number=2, free=650, running=1, prefill=350, live=live)
    assert (replica.free_tokens, replica.num_seqs, replica.num_prefill_tokens) == (600, 1, 350)
    known(table, "a", 2.5, number=3)  # given up by its client
    assert replica.is_idle and table.sent_to("r") is None


def test_a_request_that_never_came_is_not_debited_for_ever() -> None:
    table = make()
    replica = known(table, "a")
    send(table, replica, "r", 400)
    for number in range(1, 5):
        known(table, "a", float(number), number=number)
        assert not replica.is_idle
    known(table, "a", 5.0, number=5)
    assert replica.is_idle and table.sent_to("r") is None


def test_ended_debits_come_with_their_answers() -> None:
    table = make()
    send(table, known(table, "a"), "r", 400)
    answer = FinishedRequest("r", 300, 20, 100)
    ended = table.report("a", report(number=1, finished=(answer,)), 1.0)
    assert ended is not None and [(d.request_id, a) for d, a in ended] == [("r", answer)]


def test_a_request_that_came_elsewhere_is_counted_there_and_the_other_rests() -> None:
    table = make()
    first = known(table, "a")
    send(table, first, "r", 400)
    other = known(table, "b", 0.5, running=1, live=(LiveRequest("r", 0, 9),))
    assert table.sent_to("r") == "b" and "r" in other.debits
    assert first.is_idle and order(table) == ["b"]
    for name in ("a", "b"):
        known(table, name, 3.0, number=1)
    table.expire(3.4)
    assert order(table) == ["b"]
    table.expire(3.5)
    assert order(table) == ["a", "b"]


def test_late_reports_change_nothing() -> None:
    table = make()
    replica = known(table, "a", free=500, running=1, number=7)
    assert table.report("a", report(number=6), 1.0) is None
    assert replica.committed_tokens == 500


def test_silence_and_death() -> None:
    table = make()
    for name in ("a", "b"):
        known(table, name)
    send(table, known(table, "a"), "r", 10)
    known(table, "b", 2.0, number=1)
    table.expire(3.0)
    assert order(table) == ["b"] and table.sent_to("r") is None
    table.mark_dead("b", 3.0)
    assert table.report("b", report(number=2), 3.5) is None and len(table) == 0
    table.expire(6.0)
    assert known(table, "b", 6.0).is_idle


@pytest.mark.parametrize(
    "fields", [{"draining": True}, {"running": 16, "free": 10}, {"running": 3, "free": 0}]
)
def test_who_takes_nothing_is_not_offered(fields: dict[str, Any]) -> None:
    table = make()
    known(table, "a", **fields)
    assert not table.has_room and order(table) == []


def test_prefill_that_waits_fills_a_replica() -> None:
    steps = MAX_PREFILL_STEPS * 512
    replica = known(make(), "a", free=90_000, total=100_000, running=2, prefill=steps - 100)
    assert not replica.is_full
    assert replica.fits(500, 100) and not replica.fits(500, 101)
    assert known(make(), "a", free=90_000, total=100_000, running=2, prefill=steps).is_full


def test_a_long_prompt_starts_where_none_waits() -> None:
    replica = known(make(), "a", free=90_000, total=100_000, running=2)
    assert replica.fits(80_000, 80_000)


def test_an_idle_replica_takes_what_no_pool_holds() -> None:
    table = make()
    replica = known(table, "a")
    assert replica.fits(5000, 5000)
    send(table, replica, "r", 10)
    assert not replica.fits(5000, 5000)


def test_waiting_prefill_weighs_more_than_what_is_held() -> None:
    table = make()
    known(table, "holds", free=100, running=3)
    known(table, "computes", free=900, running=1, prefill=512)
    known(table, "idles")
    assert order(table) == ["idles", "holds", "computes"]


def test_the_search_for_room_ends_at_who_has_most() -> None:
    table = make()
    for i in range(50):
        known(table, f"full{i:02}", free=10, total=1000, running=1)
    known(table, "roomy", free=900, running=1, prefill=600)
    found = table.least_busy("r", 500, 500, ())
    assert found is not None and found.replica_id == "roomy"
    assert table.least_busy("r", 901, 500, ()) is None
    assert table.least_busy("r", 500, 500, ("roomy",)) is None


def test_a_kept_replica_takes_nobody_else() -> None:
    table = make()
    for name in ("a", "b"):
        known(table, name, free=300 if name == "a" else 200, running=1)
    table.reserve("large", (), 0.0)
    assert table.reserved == {"a": "large"}
    assert order(table) == ["b"]
    assert [r.replica_id for r in table.ranked("large", ())] == ["a", "b"]
    table.reserve("larger", (), 0.0)  # no more than every second replica
    assert table.reserved == {"a": "large"}
    table.release("large")
    assert order(table) == ["a", "b"]


def test_the_only_replica_can_be_kept() -> None:
    table = make()
    known(table, "a", free=300, running=1)
    table.reserve("large", ("a",), 0.0)
    assert not table.reserved
    table.reserve("large", (), 0.0)
    assert not order(table)
