"""What one engine has learnt of its drafts and its steps, as it goes to other engines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.acceptance.prior import NUM_CONTEXT_BUCKETS, Floats
from magicdec.acceptance.records import AcceptanceSnapshot, CellCount
from magicdec.config import MAX_DRAFT_LENGTH
from magicdec.draft_choice import TRAITS

# Of one replica. Counts fade with the rounds: 10,000 rows a round come to less than this.
_MOST_EXAMINED = 1e6
_MOST_DROPPED = 2**40
_MOST_SETTINGS, _MOST_KINDS = 128, 64
_FACTORS = (0.005, 200.0)  # beyond 100 times no time is believed: step_corrections.py

Setting = tuple[str, float]  # drafter and draft budget


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """What a replica observed itself, or what several did: counts summed, of factors the median.

    `cost_factors`: how much slower each kind of step is now than it was profiled, drafts beyond
    what VERIFY is. `num_dropped`: observations that could not be true.
    """

    acceptance: AcceptanceSnapshot
    cost_factors: Mapping[str, float]
    num_dropped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PackedPolicy:
    """A PolicySnapshot in columns, as it travels: the router takes one a second of every replica,
    and cell by cell that would be most of its time."""

    settings: tuple[Setting, ...]
    cells: NDArray[np.int16]  # [3, num_cells]: index in settings, context bucket, position from 0
    counts: Floats  # [2, num_cells]: examined, accepted
    cost_factors: tuple[tuple[str, float], ...]
    num_dropped: int

    @classmethod
    def pack(cls, snapshot: PolicySnapshot) -> "PackedPolicy":
        """Columns in the order of the cells."""
        settings: dict[Setting, int] = {}
        places, counts = [], []
        for cell in snapshot.acceptance.cells:
            setting = settings.setdefault((cell.drafter, cell.draft_budget), len(settings))
            places.append((setting, cell.context_bucket, cell.position - 1))
            counts.append((cell.examined, cell.accepted))
        return cls(
            tuple(settings),
            np.array(places, dtype=np.int16).reshape(-1, 3).T,
            np.array(counts, dtype=np.float64).reshape(-1, 2).T,
            tuple(snapshot.cost_factors.items()),
            snapshot.num_dropped,
        )

    def unpack(self) -> PolicySnapshot:
        """Of one without a flaw."""
        columns = zip(*self.cells.tolist(), *self.counts.tolist(), strict=True)
        cells = []
        for setting, bucket, position, examined, accepted in columns:
            drafter, draft_budget = self.settings[setting]
            at = (bucket, position + 1)
            cells.append(CellCount(drafter, draft_budget, *at, examined, accepted))
        acceptance = AcceptanceSnapshot(tuple(cells))
        return PolicySnapshot(acceptance, dict(self.cost_factors), self.num_dropped)

    def says_the_same(self, other: "PackedPolicy") -> bool:
        return (
            self.settings == other.settings
            and self.cost_factors == other.cost_factors
            and np.array_equal(self.cells, other.cells)
            and np.array_equal(self.counts, other.counts)
        )


def find_policy_flaw(policy: object) -> str | None:
    """What cannot be true of what a replica sent, naming field, value and limit; None: nothing."""
    if not isinstance(policy, PackedPolicy):
        return f"policy must be a PackedPolicy, got a {type(policy).__name__}"
    return (
        _settings_flaw(policy.settings)
        or _columns_flaw(policy.cells, policy.counts)
        or _cells_flaw(policy.cells, len(policy.settings))
        or _counts_flaw(policy.counts)
        or _factors_flaw(policy.cost_factors)
        or _dropped_flaw(policy.num_dropped)
    )


def _settings_flaw(settings: object) -> str | None:
    if not isinstance(settings, tuple) or len(settings) > _MOST_SETTINGS:
        return f"settings must be a tuple of at most {_MOST_SETTINGS}, got {settings!r:.80}"
    for setting in settings:
        if not isinstance(setting, tuple) or len(setting) != 2:
            return f"settings must be pairs of drafter and draft_budget, got {setting!r:.80}"
        drafter, draft_budget = setting
        if not isinstance(drafter, str) or drafter not in TRAITS:
            return f"drafter must be one of {', '.join(TRAITS)}, got {drafter!r:.80}"
        if not _is_number(draft_budget) or not 0 < draft_budget < math.inf:
            return f"draft_budget must be above 0 and finite, got {draft_budget!r:.80}"
    return None


def _columns_flaw(cells: object, counts: object) -> str | None:
    """Of arrays that may be anything."""
    if not isinstance(cells, np.ndarray) or not isinstance(counts, np.ndarray):
        return f"cells and counts must be arrays, got {type(cells)} and {type(counts)}"
    if cells.dtype != np.int16 or counts.dtype != np.float64:
        return f"cells must be int16 and counts float64, got {cells.dtype} and {counts.dtype}"
    if cells.ndim != 2 or cells.shape[0] != 3 or counts.shape != (2, cells.shape[1]):
        return f"cells must be [3, n] and counts [2, n], got {cells.shape} and {counts.shape}"
    return None


def _cells_flaw(cells: NDArray[np.int16], num_settings: int) -> str | None:
    if cells.shape[1] == 0:
        return None
    limits = (num_settings, NUM_CONTEXT_BUCKETS, MAX_DRAFT_LENGTH)
    for name, row, limit in zip(("setting", "bucket", "position"), cells, limits, strict=True):
        if row.min() < 0 or row.max() >= limit:
            return f"{name} of a cell must be from 0 to {limit - 1}, got {row.min()} to {row.max()}"
    numbers = np.ravel_multi_index(tuple(cells), limits)
    if len(np.unique(numbers)) < len(numbers):
        return f"every cell must be named once, got {len(numbers)} names of fewer cells"
    return None


def _counts_flaw(counts: Floats) -> str | None:
    """NaN fails every comparison."""
    examined, accepted = counts
    fine = (accepted >= 0.0) & (accepted <= examined) & (examined <= _MOST_EXAMINED)
    if fine.all():
        return None
    worst = int(np.argmin(fine))
    return (
        f"of examined drafts, at most {_MOST_EXAMINED:.0f}, from 0 to all must be accepted, "
        f"got {accepted[worst]} of {examined[worst]}"
    )


def _factors_flaw(factors: object) -> str | None:
    if not isinstance(factors, tuple) or len(factors) > _MOST_KINDS:
        return f"cost_factors must be a tuple of at most {_MOST_KINDS}, got {factors!r:.80}"
    least, most = _FACTORS
    names = set()
    for pair in factors:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            return f"cost_factors must be pairs of kind and factor, got {pair!r:.80}"
        kind, factor = pair
        names.add(kind)
        if not _is_number(factor) or not least <= factor <= most:
            return f"cost factor of {kind:.80} must be from {least} to {most}, got {factor!r:.80}"
    if len(names) < len(factors):
        return f"cost_factors must name every kind once, got {factors!r:.80}"
    return None


def _dropped_flaw(num_dropped: object) -> str | None:
    if isinstance(num_dropped, int) and 0 <= num_dropped <= _MOST_DROPPED:
        return None
    return f"num_dropped must be a whole number from 0 to {_MOST_DROPPED}, got {num_dropped!r:.80}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
