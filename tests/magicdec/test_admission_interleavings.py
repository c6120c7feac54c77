"""Any interleaving of arrivals, reports, deaths and ends: nobody lost, sent twice or passed."""

import dataclasses
import math
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from magicdec.admission import Admission
from magicdec.routing.settings import AdmissionConfig, Ask, Assignment
from magicdec.routing.waiting import length_class
from tests.magicdec.routing.replicas import Clock, CountedReplica, report

NAMES = ("a", "b")
TOTAL = 4000  # KV tokens a replica
CONFIG = AdmissionConfig(
    max_queued_requests=10, age_bound_s=0.5, lease_s=math.inf, fairness_slack_tokens=1000
)


@dataclasses.dataclass
class Client:
    """An ingress waiting for a replica."""

    ask: Ask
    since: float  # when it first asked
    asked_at: float  # when it last asked a router that did not know it


class Room(NamedTuple):
    """Of one replica, as the router knows it."""

    free: int
    seats: int
    num_seqs: int


class Interleavings(RuleBasedStateMachine):
    """Replicas may die, come back, fall silent, drain and lie; the router may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(self.clock, CONFIG)
        self.replicas = {name: CountedReplica(TOTAL, 4) for name in NAMES}
        self.clients: dict[str, Client] = {}  # waiting
        self.sent: dict[str, tuple[Ask, str | None]] = {}  # decided, not yet at the replica
        self.num_asks = 0
        for name in NAMES:
            self.hear(name)

    # What happens

    @rule(
        key=st.sampled_from(["x", "y"]),
        contexts=st.lists(st.sampled_from([40, 300, 400, 900, 1800, 3000]), min_size=1, max_size=5),
        max_tokens=st.integers(1, 900),
        prefix=st.integers(0, 2),
        exclude=st.sampled_from([(), (), ("a",), ("b",)]),
    )
    def arrive(
        self, key: str, contexts: list[int], max_tokens: int, prefix: int, exclude: tuple[str, ...]
    ) -> None:
        for context in contexts:
            self.num_asks += 1
            hashes = tuple(prefix * 100 + i for i in range(context // 1000))
            self.ask(Ask(f"r{self.num_asks}", context, max_tokens, key, hashes, exclude))

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.3, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        for name in NAMES:
            self.hear(name)

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """What was decided reaches the replica; now and then one that the cluster chose instead."""
        for request_id in sorted(self.sent):
            ask, target = self.sent[request_id]
            fate = data.draw(st.sampled_from(["arrives"] * 8 + ["strays", "is asked again"]))
            if fate == "is asked again":
                self.ask_again(request_id)
                continue
            del self.sent[request_id]
            name = target if target and fate == "arrives" else data.draw(st.sampled_from(NAMES))
            self.replicas[name].take(ask)

    @precondition(lambda self: any(r.live for r in self.replicas.values()))
    @rule(data=st.data(), steps=st.integers(1, 40), ends=st.integers(0, 3))
    def serve(self, data: st.DataObject, steps: int, ends: int) -> None:
        replica = self.replicas[
            data.draw(st.sampled_from([n for n in NAMES if self.replicas[n].live]))
        ]
        for request_id in sorted(replica.live):
            for _ in range(steps):
                replica.step(request_id)
        for request_id in sorted(replica.live)[:ends]:
            replica.end(request_id, answered=steps % 4 > 0)

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def trouble(self, name: str, data: st.DataObject) -> None:
        kinds = [self.lie, self.die, self.drain, self.come_back, self.fall_silent, self.leave]
        data.draw(st.sampled_from([*kinds, self.restart]))(name)

    def hear(self, name: str) -> None:
        self.admission.report(name, self.replicas[name].report())
        self.pump()

    def lie(self, name: str) -> None:
        before, held = self.admission.stats().num_dropped_reports, self.room(name)
        absurd: list[Any] = [math.nan, -1, TOTAL + 1, 2**60, "many"]
        for free in absurd:
            load = dataclasses.replace(report(total=TOTAL).load, free_kv_tokens=free)
            wrong = dataclasses.replace(self.replicas[name].report(), load=load)
            assert not self.admission.report(name, wrong)
        assert self.admission.stats().num_dropped_reports == before + len(absurd)
        assert self.room(name) in (held, None)

    def ask_again(self, request_id: str) -> None:
        """The decision got lost on its way: it must be the same while its debit lasts."""
        ask, target = self.sent[request_id]
        known = self.admission.replica(target) if target else None
        if known is not None and request_id in known.debits:
            assert self.admission.submit(ask) == Assignment(request_id, target)

    def die(self, name: str) -> None:
        """Its clients ask again, to go first and elsewhere."""
        lost = list(self.replicas[name].live.values())
        self.replicas[name] = CountedReplica(TOTAL, 4)
        self.admission.mark_dead(name)
        assert name not in self.admission.live_replicas()
        for ask in lost:
            self.num_asks += 1
            request_id = f"r{self.num_asks}"
            self.ask(dataclasses.replace(ask, request_id=request_id, resumed=True, exclude=(name,)))

    def drain(self, name: str) -> None:
        self.replicas[name].draining = True
        self.hear(name)

    def come_back(self, name: str) -> None:
        """From a drain, or from the dead: it was a wrong accusation, or has the name anew."""
        self.clock.now += CONFIG.report_timeout_s
        for each in NAMES:
            self.replicas[each].draining &= each != name
            self.hear(each)

    def fall_silent(self, name: str) -> None:
        for _ in range(4):
            self.clock.now += 1.0
            for each in NAMES:
                if each != name:
                    self.hear(each)

    def leave(self, name: str) -> None:
        """One of those who wait gives up."""
        for request_id in sorted(self.clients)[:1]:
            del self.clients[request_id]
            self.admission.cancel(request_id)
        self.pump()

    def restart(self, name: str) -> None:
        """A router that knows nothing: replicas report, those who wait ask again."""
        self.admission = Admission(self.clock, CONFIG)
        for request_id in sorted(self.clients):
            client = self.clients[request_id]
            client.asked_at = self.clock.now
            waited = self.clock.now - client.since
            self.admission.submit(dataclasses.replace(client.ask, waited_s=waited))
        self.pump()

    # What must hold

    def ask(self, ask: Ask) -> None:
        self.clients[ask.request_id] = Client(ask, self.clock.now, self.clock.now)
        assert self.admission.submit(ask) is None
        self.pump()

    def pump(self) -> None:
        before = {n: self.room(n) for n in NAMES}
        for decided in self.admission.release():
            client = self.clients.pop(decided.request_id)  # KeyError: decided twice, or unasked
            assert not (decided.retry_after_s is not None and client.ask.resumed)
            if decided.retry_after_s is not None:
                assert decided.replica_id is None and 1.0 <= decided.retry_after_s <= 60.0
                continue
            name = decided.replica_id
            self.sent[decided.request_id] = (client.ask, name)
            if name is None:
                continue
            assert name not in client.ask.exclude
            self.check_nobody_was_passed(client, name, before[name])
            room = before[name]
            assert room is not None, "sent to a replica that is not live"
            assert fits(room, decided.num_tokens), "sent without room"
            before[name] = Room(room.free - decided.num_tokens, room.seats - 1, room.num_seqs + 1)

    def check_nobody_was_passed(self, chosen: Client, name: str, room: Room | None) -> None:
        """The oldest of a key that is beyond its age bound had no room where a younger one goes."""
        others = [c for c in self.clients.values() if c.ask.key == chosen.ask.key]
        oldest = min(others, key=self.first_at, default=chosen)
        overdue = self.first_at(oldest) <= self.clock.now
        if overdue and self.first_at(oldest) < self.first_at(chosen):
            most = oldest.ask.num_context_tokens + oldest.ask.max_tokens
            assert name in oldest.ask.exclude or not fits(room, most)

    def first_at(self, client: Client) -> float:
        return client.asked_at if client.ask.resumed else client.since + CONFIG.age_bound_s

    def room(self, name: str) -> Room | None:
        replica = self.admission.replica(name)
        if replica is None:
            return None
        seats = replica.report.max_num_seqs - replica.num_seqs
        return Room(replica.total_kv_tokens - replica.committed_tokens, seats, replica.num_seqs)

    @invariant()
    def the_queue_is_who_waits(self) -> None:
        assert self.admission.stats().num_queued == len(self.clients)

    @invariant()
    def the_queue_is_bounded(self) -> None:
        fresh = [c for c in self.clients.values() if not c.ask.resumed]
        resumed = len(self.clients) - len(fresh)
        assert len(fresh) <= max(CONFIG.max_queued_requests - resumed, 0) or not fresh

    @invariant()
    def nobody_waits_while_a_replica_idles(self) -> None:
        for name in self.admission.live_replicas():
            replica = self.admission.replica(name)
            assert replica is not None
            if replica.is_idle and replica.may_take(self.clock.now):
                assert all(name in c.ask.exclude for c in self.clients.values())

    @invariant()
    def company_is_waited_for_no_longer_than_allowed(self) -> None:
        """Beyond that the first of each key and class has room nowhere, or a replica is kept."""
        live = [r for n in self.admission.live_replicas() if (r := self.admission.replica(n))]
        if self.admission.stats().num_reserved_replicas:
            return
        firsts: dict[tuple[str, int], Client] = {}
        for client in self.clients.values():
            group = (client.ask.key, length_class(client.ask.num_context_tokens))
            if group not in firsts or self.first_at(client) < self.first_at(firsts[group]):
                firsts[group] = client
        for client in firsts.values():
            if self.clock.now - client.asked_at <= CONFIG.company_wait_s:
                continue
            needed = client.ask.num_context_tokens + client.ask.max_tokens
            for replica in live:
                if (
                    replica.may_take(self.clock.now)
                    and replica.replica_id not in client.ask.exclude
                ):
                    assert not replica.fits(needed, client.ask.num_context_tokens)


def fits(room: Room | None, num_tokens: int) -> bool:
    if room is None:
        return False
    return room.num_seqs == 0 or (room.seats > 0 and room.free >= num_tokens)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
