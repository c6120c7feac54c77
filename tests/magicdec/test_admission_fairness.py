"""Keys that always have something waiting are served alike, whatever replicas do."""

import itertools
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from magicdec.admission import Admission
from magicdec.routing.settings import AdmissionConfig, Ask
from tests.magicdec.routing.replicas import Clock, CountedReplica

SLACK = 2000
LARGEST = 1500  # tokens of a request, answer included


class Service:
    """Replicas behind an Admission, and what each key was served, in tokens."""

    def __init__(self, totals: dict[str, int], *, seats: int) -> None:
        self.clock = Clock()
        config = AdmissionConfig(
            max_queued_requests=1000,
            lease_s=math.inf,
            age_bound_s=20.0,
            fairness_slack_tokens=SLACK,
        )
        self.admission = Admission(self.clock, config)
        self.replicas = {name: CountedReplica(total, seats) for name, total in totals.items()}
        self.served: Counter[str] = Counter()
        self.asks: dict[str, Ask] = {}
        self._charged: dict[str, int] = {}
        self._numbers = itertools.count()
        self.hear()

    def ask(self, key: str, context: int, max_tokens: int) -> None:
        ask = Ask(f"{key}{next(self._numbers)}", context, max_tokens, key)
        self.asks[ask.request_id] = ask
        self.admission.submit(ask)

    def num_waiting(self, key: str) -> int:
        return sum(ask.key == key for ask in self.asks.values())

    def hear(self) -> None:
        for name, replica in self.replicas.items():
            self.admission.report(name, replica.report())
        for decided in self.admission.release():
            ask = self.asks.pop(decided.request_id)
            assert decided.replica_id is not None
            self.replicas[decided.replica_id].take(ask)
            self.served[ask.key] += decided.num_tokens
            self._charged[decided.request_id] = decided.num_tokens

    def finish(self, name: str, num_output_tokens: int) -> None:
        """The oldest request of a replica; what it was not served is taken back."""
        replica = self.replicas[name]
        for request_id in list(replica.live)[:1]:
            ask = replica.live[request_id]
            replica.outputs[request_id] = num_output_tokens
            replica.end(request_id, answered=True)
            self.served[ask.key] += ask.num_context_tokens + num_output_tokens
            self.served[ask.key] -= self._charged[request_id]

    def die(self, name: str) -> None:
        self.admission.mark_dead(name)
        old = self.replicas[name]
        self.replicas[name] = CountedReplica(old.total, old.max_num_seqs)
        for _ in range(3):
            self.clock.now += 1.0
            self.hear()


STEPS = st.tuples(
    st.sampled_from(["a", "b"]),
    st.integers(1, 500),  # tokens of the answer
    st.integers(0, 19),  # 0: a death
    st.tuples(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 1000)),
)


@given(st.lists(STEPS, max_size=60))
def test_keys_that_always_wait_are_served_alike(
    steps: list[tuple[str, int, int, tuple[int, int, int]]],
) -> None:
    """With room for any request wherever there is a seat: apart by no more than the slack and the
    largest request, for what began and for what ended."""
    service = Service({"a": 100_000, "b": 100_000}, seats=3)
    for name, num_output_tokens, fate, contexts in [*steps, *steps]:
        for key, context in zip("xyz", contexts, strict=True):
            while service.num_waiting(key) < 9:
                service.ask(key, context, 500)
        service.hear()
        served = [service.served[key] for key in "xyz"]
        assert max(served) - min(served) <= SLACK + 2 * LARGEST
        if fate == 0:
            service.die(name)
        else:
            service.finish(name, num_output_tokens)
        service.clock.now += 0.1


def test_long_requests_get_their_share_of_a_pool_that_short_ones_fill() -> None:
    """A pool of two long requests: they never fit by chance among short ones that always wait."""
    service = Service({"a": 20_000}, seats=64)
    for _ in range(600):
        while service.num_waiting("long") < 4:
            service.ask("long", 9000, 10)
        while service.num_waiting("short") < 80:
            service.ask("short", 300, 10)
        service.hear()
        for _ in range(2):
            service.finish("a", 10)
        service.clock.now += 0.1
    ratio = service.served["long"] / service.served["short"]
    assert 0.5 < ratio < 2.0
