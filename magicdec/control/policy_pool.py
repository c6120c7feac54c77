"""What all replicas have learnt together: what each gets back is what the others know.

Pure: no Ray, no thread, and the time is given to it.
"""

import logging
from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from statistics import median

import numpy as np

from magicdec.acceptance.prior import NUM_CONTEXT_BUCKETS, Floats
from magicdec.acceptance.records import AcceptanceSnapshot
from magicdec.config import MAX_DRAFT_LENGTH
from magicdec.control.policy_snapshot import PackedPolicy, PolicySnapshot, Setting, find_policy_flaw

logger = logging.getLogger(__name__)

_KEEP_S = 600.0
_SETTLE_S = 2.5
_LEAST_COUNT = 1e-3  # less is what rounding leaves of a sum
_MOST_SETTINGS = 1024  # that ever were, before those that are not any more are cleared
_NOTHING = PackedPolicy.pack(PolicySnapshot(AcceptanceSnapshot(()), {}))


@dataclass(frozen=True, slots=True)
class _Share:
    """What one replica has in the sums."""

    policy: PackedPolicy
    heard_at: float


class PolicyPool:
    """Each replica's last policy without a flaw, and their sums. Times in seconds, monotonic.

    The sums are kept up to date, not made anew, so that an exchange costs its own cells alone. A
    replica's own share is out while its answer is made: it never gets back what it said itself.

    A replica that is gone stays in for _KEEP_S: what it saw is as true as it was, and one that
    takes its place starts with it, even where it was the only one. A pool that is new tells nobody
    anything for _SETTLE_S, in which every replica reports: what some of them know must not replace
    what an earlier pool had told of all.
    """

    def __init__(self, now: float) -> None:
        self.num_dropped = 0  # policies that could not be true
        self._settles_at = now + _SETTLE_S
        self._shares: OrderedDict[str, _Share] = OrderedDict()  # least recently heard of first
        self._sums = _Sums()

    def __len__(self) -> int:
        """Replicas in the sums, those that are gone included."""
        return len(self._shares)

    def exchange(
        self, replica_id: str, policy: PackedPolicy | None, now: float
    ) -> PackedPolicy | None:
        """Takes what a replica knows, returns what the others do; None: nothing.

        One that says nothing is told once, when it is new. A policy with a flaw counts as none, and
        the replica's last one stays.
        """
        self._forget(now)
        last = self._shares.get(replica_id)
        if policy is None or not self._is_sound(replica_id, policy):
            if last is not None:
                return None
            policy = _NOTHING
        if last is not None:
            self._sums.add(last.policy, -1)
        answer = self._sums.packed() if now >= self._settles_at else None
        self._sums.add(policy, 1)
        self._shares[replica_id] = _Share(policy, now)
        self._shares.move_to_end(replica_id)
        if self._sums.num_settings > _MOST_SETTINGS:
            self._sums = _Sums()
            for share in self._shares.values():
                self._sums.add(share.policy, 1)
        return answer

    def _is_sound(self, replica_id: str, policy: PackedPolicy) -> bool:
        flaw = find_policy_flaw(policy)
        if flaw is None:
            return True
        self.num_dropped += 1
        if self.num_dropped.bit_count() == 1:  # ever more rarely
            logger.warning("a policy of %s was dropped: %s", replica_id, flaw)
        return False

    def _forget(self, now: float) -> None:
        while self._shares:
            replica_id, share = next(iter(self._shares.items()))
            if now - share.heard_at < _KEEP_S:
                return
            self._sums.add(share.policy, -1)
            del self._shares[replica_id]


class _Sums:
    """Counts by setting, context bucket and position; factors by kind, all of them."""

    def __init__(self) -> None:
        self._settings: dict[Setting, int] = {}
        # [examined or accepted, setting, context bucket, position]
        self._counts: Floats = np.zeros((2, 0, NUM_CONTEXT_BUCKETS, MAX_DRAFT_LENGTH))
        self._factors: dict[str, list[float]] = {}  # ascending
        self._num_dropped = 0

    @property
    def num_settings(self) -> int:
        return len(self._settings)

    def add(self, policy: PackedPolicy, sign: int) -> None:
        """Puts a policy without a flaw in, or takes out one that is in."""
        for setting in policy.settings:
            self._settings.setdefault(setting, len(self._settings))
        missing = len(self._settings) - self._counts.shape[1]
        if missing > 0:
            self._counts = np.pad(self._counts, ((0, 0), (0, missing), (0, 0), (0, 0)))
        numbers = np.array([self._settings[s] for s in policy.settings], dtype=np.intp)
        setting_of, bucket, position = policy.cells
        self._counts[:, numbers[setting_of], bucket, position] += sign * policy.counts
        for kind, factor in policy.cost_factors:
            factors = self._factors.setdefault(kind, [])
            if sign > 0:
                insort(factors, factor)
            else:
                del factors[bisect_left(factors, factor)]
                if not factors:
                    del self._factors[kind]
        self._num_dropped += sign * policy.num_dropped

    def packed(self) -> PackedPolicy | None:
        """Sums of the counts, the median of each kind's factors; None where there are none."""
        setting, bucket, position = np.nonzero(self._counts[0] > _LEAST_COUNT)
        examined, accepted = self._counts[:, setting, bucket, position]
        if len(examined) == 0 and not self._factors:
            return None
        return PackedPolicy(
            tuple(self._settings),
            np.array([setting, bucket, position], dtype=np.int16),
            np.array([examined, np.clip(accepted, 0.0, examined)]),
            tuple((kind, median(factors)) for kind, factors in self._factors.items()),
            self._num_dropped,
        )
