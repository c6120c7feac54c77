"""How far one request's acceptance lies from what its cells say: a log-odds offset a family.

The counts are kept and the offset is worked out anew against the cells as they are now, so that
what all requests have in common moves from the offsets into the cells and is not counted twice.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from magicdec.acceptance.prior import Floats, sigmoid

_SPREAD = 1.2  # standard deviation of the offsets between requests, log-odds
_MAX_OFFSET = 4.0
_HALF_LIFE = 16.0  # rounds of the request that drafted
_THRESHOLD = 4.0  # of the log-likelihood ratio, at which a request has turned
_OUTWEIGHED = 24.0  # examined drafts; against fewer, what is new counts soon enough
_FORGET = 0.1  # of its counts that outlives that
_MAX_STEP = 1.5
_NEWTON_STEPS = 2  # a call; they go on from the last call's offset


class RequestOffsets:
    """Decayed counts of the latest requests, by setting and position. The rest are unknown: 0.

    `families` is each setting's. A request that one family of drafters fails may suit another.
    """

    def __init__(self, families: Sequence[int], num_positions: int, capacity: int = 512) -> None:
        self._families = np.array(families)  # [num_settings]
        num_settings, num_families = len(families), 1 + max(families)
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently drafted for first
        self._capacity = capacity
        self._examined = np.zeros((capacity, num_settings, num_positions))
        self._accepted = np.zeros((capacity, num_settings, num_positions))
        self._num_rounds = np.zeros(capacity, dtype=np.int64)
        # Page's CUSUM of each request, upwards and downwards.
        self._sums = np.zeros((capacity, num_families, 2))
        # One slot more, of all unknown requests.
        self._offsets = np.zeros((capacity + 1, num_families))
        self._variances = np.full((capacity + 1, num_families), _SPREAD**2)

    def add(
        self,
        keys: Sequence[str | None],
        settings: Sequence[int],
        examined: Floats,
        accepted: Floats,
        gains: Floats,
    ) -> None:
        """One round, one row a request, or several rounds at once that drafted alike. Counts are
        [num_rows, num_positions], `gains` [2, num_rows] as of likelihood_gains: a request may turn
        while the others go on as they were."""
        rows = [row for row, key in enumerate(keys) if key]
        slots = [self._slot(key) for key in keys if key]
        cells = (slots, [settings[row] for row in rows])
        families = self._families[cells[1]]  # [num_keyed]
        same = self._families == families[:, None]  # [num_keyed, num_settings]
        np.add.at(self._num_rounds, slots, 1)
        np.add.at(self._sums, (slots, families.tolist()), gains.T[rows])
        sums = np.maximum(self._sums[slots, families], 0.0)  # [num_keyed, 2]
        alarm = sums.max(axis=1) > _THRESHOLD
        self._sums[slots, families] = np.where(alarm[:, None], 0.0, sums)
        num_examined = (self._examined[slots].sum(axis=2) * same).sum(axis=1)
        turned = alarm & (num_examined > _OUTWEIGHED)
        fading = np.where(turned, _FORGET, 0.5 ** (1.0 / _HALF_LIFE))
        keep = np.where(same, fading[:, None], 1.0)[:, :, None]
        for counts, new in ((self._examined, examined), (self._accepted, accepted)):
            counts[slots] *= keep
            np.add.at(counts, cells, new[rows])

    def num_rounds(self, key: str) -> int:
        slot = self._slots.get(key)
        return 0 if slot is None else int(self._num_rounds[slot])

    def forget(self, share_kept: float) -> None:
        self._examined *= share_kept
        self._accepted *= share_kept

    def look_up(self, keys: Sequence[str]) -> tuple[Floats, Floats]:
        """Offsets and variances as of the last `follow`: both [num_rows, num_settings]."""
        slots = [self._slots.get(key, self._capacity) for key in keys]
        at = np.ix_(np.array(slots, dtype=np.int64), self._families)
        return self._offsets[at], self._variances[at]

    def follow(self, keys: Sequence[str], cell_logits: Floats, which: Sequence[int]) -> None:
        """Works the offsets of those requests out again, against the cells as they are now.

        `cell_logits` is [num_buckets, num_settings, num_positions], `which` each request's bucket.
        """
        known = [i for i, key in enumerate(keys) if key in self._slots]
        if not known:
            return
        slots = [self._slots[keys[i]] for i in known]
        examined = self._examined[slots].reshape(len(slots), -1)  # [num_known, num_cells]
        seen = np.flatnonzero(examined.any(axis=0))
        examined = examined[:, seen]
        num_positions = cell_logits.shape[2]
        families = self._families[seen // num_positions]
        membership = families[:, None] == np.arange(self._offsets.shape[1])  # [num_seen, families]
        accepted = self._accepted[slots].reshape(len(slots), -1)[:, seen] @ membership
        logits = cell_logits.reshape(len(cell_logits), -1)[:, seen][[which[i] for i in known]]
        offsets, precision = self._offsets[slots], 1.0 / _SPREAD**2
        for _ in range(_NEWTON_STEPS):
            hazards = sigmoid(logits + offsets[:, families])
            weighted = examined * hazards
            slope = accepted - weighted @ membership - precision * offsets
            bend = (weighted * (1.0 - hazards)) @ membership + precision
            step = np.clip(slope / bend, -_MAX_STEP, _MAX_STEP)
            offsets = np.clip(offsets + step, -_MAX_OFFSET, _MAX_OFFSET)
        self._offsets[slots] = offsets
        self._variances[slots] = 1.0 / bend

    def _slot(self, key: str) -> int:
        slot = self._slots.get(key)
        if slot is None:
            full = len(self._slots) == self._capacity
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            self._examined[slot] = self._accepted[slot] = 0.0
            self._offsets[slot], self._variances[slot] = 0.0, _SPREAD**2
            self._sums[slot], self._num_rounds[slot] = 0.0, 0
            self._slots[key] = slot
        self._slots.move_to_end(key)
        return slot
