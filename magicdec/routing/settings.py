"""What an operator chooses of the router's policy, and the nouns it is asked and answers with."""

from collections.abc import Mapping
from dataclasses import dataclass

from magicdec.config import check_at_least


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Times in seconds. Raises ConfigError naming field, value and limit.

    The defaults of the last group need no operator: they follow from how replicas report.
    """

    max_queued_requests: int = 256
    company_wait_s: float = 0.02  # for requests of the same length; never while a replica idles
    age_bound_s: float = 10.0  # from then on a request goes before all others of its key
    length_classes: bool = True  # requests of like length start together, on the same replicas
    prefix_affinity: bool = True  # a prompt goes where its beginning is cached
    overload_factor: float = 1.5  # how much busier than the least busy a replica so chosen may be
    max_prefix_hashes: int = 1 << 17  # remembered; about 100 bytes each

    report_timeout_s: float = 3.0  # a replica that was silent for so long is not live
    debit_timeout_s: float = 5.0  # a request sent that no report had by then never arrived
    lease_s: float = 10.0  # a request that nobody asked about for so long is given up
    blind_wait_s: float = 2.0  # for a first replica to report, before the cluster chooses
    fairness_slack_tokens: int = 16384  # that company may bring a key ahead of its turn
    min_retry_after_s: float = 1.0
    max_retry_after_s: float = 60.0
    unknown_retry_after_s: float = 5.0  # before anything has drained

    def __post_init__(self) -> None:
        check_at_least("max_queued_requests", self.max_queued_requests, 1)
        check_at_least("company_wait_s", self.company_wait_s, 0)
        check_at_least("age_bound_s", self.age_bound_s, self.company_wait_s)
        check_at_least("overload_factor", self.overload_factor, 1)
        check_at_least("max_prefix_hashes", self.max_prefix_hashes, 1)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that wants a replica, under the id that the replica will see.

    `num_context_tokens` is prompt and what was emitted already; `max_tokens` what may still come.
    `waited_s` is what it waited at a router that is gone. A `resumed` one was admitted before: it
    is never refused, and goes first, since its client has a part of the answer.
    """

    request_id: str
    num_context_tokens: int
    max_tokens: int
    key: str = ""
    prefix_hashes: tuple[int, ...] = ()
    exclude: tuple[str, ...] = ()
    resumed: bool = False
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What became of an Ask.

    `retry_after_s` set: refused, the queue is full. Otherwise `replica_id` None: no live replica is
    known that it may go to, let the cluster choose. `num_tokens` is what it was charged.
    """

    request_id: str
    replica_id: str | None
    retry_after_s: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0  # of its context, probably


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """Now, and counted since the start."""

    num_queued: int
    num_queued_tokens: int
    num_live_replicas: int
    num_reserved_replicas: int  # kept for a request that has room nowhere yet
    num_released: int
    num_refused: int
    num_abandoned: int  # nobody waited for them any more
    num_dropped_reports: int  # that could not be true
    drain_tokens_per_s: float | None
    num_queued_by_class: Mapping[int, int]  # see waiting.length_class
    num_dropped_policies: int = 0  # likewise, of what replicas say they have learnt
