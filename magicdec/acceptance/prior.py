"""What is expected of a draft before enough of it was seen: an additive logit model.

A hazard is the probability that the draft at a position is accepted, given that every draft before
it in its round was. A cell is one context bucket x setting x position; a setting is a drafter with
a budget tier. Settings stand drafter by drafter, tiers ascending.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.config import (
    MAX_DRAFT_LENGTH,
    ConfigError,
    check_at_least,
    check_at_most,
)
from magicdec.draft_choice import TRAITS

Floats = NDArray[np.float64]

CELL_WEIGHT = 16.0  # examined drafts after which a cell counts as much as what its relatives say
NUM_CONTEXT_BUCKETS = 15  # powers of two: below 128 tokens, 128, ... from 2^20 on
_FIRST_BUCKET_BITS = 7

# Logits of sampled text by SmolLM2-135M at 7,000 tokens (docs/acceptance.md), the draft model's of
# MagicDec's Table 6, the decay with the context of its authors' blog (.84 at 4K to .79 at 100K).
# They lead until something is seen.
_LEVEL = 1.85  # streaming, 512 positions, 8,192 tokens
_DRAFTER_LOGITS = {"snapkv": 0.2, "recycled": 0.45, "draft_model": -1.0, "ngram": -3.5}
_LOGIT_PER_BUDGET_DOUBLING = 0.45
_LOGIT_PER_CONTEXT_DOUBLING = -0.07
_REFERENCE_BUDGET, _REFERENCE_BUCKET = 512, 7

_LEVEL_WEIGHT = 0.2  # of the prior, in units of information; the level follows the data freely
_FIRST_TERM_WEIGHT = 2.0
_TERM_WEIGHT = 8.0
_MAX_STEP = 2.0  # logits a Newton step
_RETURN = 0.4  # of what was learnt of single cells, lost at every restart
_LEAST_EXAMINED = 1e-2  # cells seen less are left out of a fit


@dataclass(frozen=True, slots=True)
class AcceptanceAxes:
    """Which drafters, budget tiers and positions are told apart.

    A tier is a number of KV positions, or below 1 a share of the context. Drafters that read no
    view have one tier, the first. Raises ConfigError for an axis that is empty, unordered or
    unknown.
    """

    drafters: tuple[str, ...]
    draft_budgets: tuple[float, ...]  # ascending
    max_draft_length: int = MAX_DRAFT_LENGTH

    def __post_init__(self) -> None:
        unknown = [name for name in self.drafters if name not in TRAITS]
        if unknown or not self.drafters or len(set(self.drafters)) < len(self.drafters):
            names = ", ".join(TRAITS)
            raise ConfigError(
                f"drafters must be one or more of {names}, once each, got {self.drafters}"
            )
        if not self.draft_budgets or list(self.draft_budgets) != sorted(set(self.draft_budgets)):
            raise ConfigError(f"draft_budgets must ascend, got {self.draft_budgets}")
        if not 0 < self.draft_budgets[0] <= self.draft_budgets[-1] < math.inf:
            raise ConfigError(f"draft_budgets must be above 0, got {self.draft_budgets}")
        check_at_least("max_draft_length", self.max_draft_length, 1)
        check_at_most("max_draft_length", self.max_draft_length, MAX_DRAFT_LENGTH)

    @property
    def num_settings(self) -> int:
        return len(self.drafters) * len(self.draft_budgets)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[num_buckets, num_settings, max_draft_length]"""
        return (NUM_CONTEXT_BUCKETS, self.num_settings, self.max_draft_length)

    def setting(self, drafter: str, draft_budget: float, context_len: int) -> int:
        """The setting's index; a budget between tiers belongs to the nearest, by ratio."""
        first = self.drafters.index(drafter) * len(self.draft_budgets)
        if not TRAITS[drafter].reads_view:
            return first
        if draft_budget in self.draft_budgets:
            return first + self.draft_budgets.index(draft_budget)
        wanted = math.log(view_positions(draft_budget, context_len))
        distances = [
            abs(math.log(view_positions(tier, context_len)) - wanted) for tier in self.draft_budgets
        ]
        return first + distances.index(min(distances))

    def served_settings(self) -> list[int]:
        """All that differ: a drafter that reads no view appears once."""
        num_tiers = len(self.draft_budgets)
        return [
            i * num_tiers + tier
            for i, drafter in enumerate(self.drafters)
            for tier in range(num_tiers if TRAITS[drafter].reads_view else 1)
        ]

    @property
    def families(self) -> tuple[int, ...]:
        """Of each drafter. Those that read a view err alike, being the target over less of its KV;
        any other says nothing of them, nor they of it."""
        others = itertools.count(1)
        return tuple(0 if TRAITS[name].reads_view else next(others) for name in self.drafters)

    def name(self, setting: int) -> tuple[str, float]:
        """Drafter and budget of a setting."""
        drafter, tier = divmod(setting, len(self.draft_budgets))
        return self.drafters[drafter], self.draft_budgets[tier]


def view_positions(draft_budget: float, context_len: float) -> float:
    """KV positions that a budget means, a share resolved."""
    return draft_budget if draft_budget >= 1 else draft_budget * context_len


def context_bucket(context_len: int) -> int:
    """The power of two: 0 below 128 tokens, 1 below 256, ..."""
    bits = int(context_len).bit_length()
    return min(max(bits - _FIRST_BUCKET_BITS, 0), NUM_CONTEXT_BUCKETS - 1)


def sigmoid(logits: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


class AdditivePrior:
    """logit = as measured once + level + drafter + tier + context bucket + position.

    All but the drafter's own are those of its family. Every term is drawn to its anchor, at first
    0; the level hardly. A cell counts as CELL_WEIGHT examined drafts at most: what is peculiar to
    it says no more of its relatives, however often it is seen.
    """

    def __init__(self, axes: AcceptanceAxes) -> None:
        buckets, settings, positions = np.indices(axes.shape)
        drafters, tiers = np.divmod(settings, len(axes.draft_budgets))
        family = np.array(axes.families)[drafters]
        num_families = 1 + max(axes.families)
        num_tiers, (num_buckets, _, num_positions) = len(axes.draft_budgets), axes.shape
        self._entries = (  # each cell's, term by term
            family,
            drafters,
            family * num_tiers + tiers,
            family * num_buckets + buckets,
            family * num_positions + positions,
        )
        sizes = (1, num_tiers, num_buckets, num_positions)
        level, *others = (np.zeros(num_families * size) for size in sizes)
        self._terms = [level, np.zeros(len(axes.drafters)), *others]
        budgets = [view_positions(b, 8192) / _REFERENCE_BUDGET for b in axes.draft_budgets]
        known = np.array([_DRAFTER_LOGITS.get(name, 0.0) for name in axes.drafters])
        self._measured = (  # [num_buckets, num_settings, max_draft_length]
            _LEVEL
            + known[drafters]
            + _LOGIT_PER_BUDGET_DOUBLING * np.log2(budgets)[tiers]
            + _LOGIT_PER_CONTEXT_DOUBLING * (buckets - float(_REFERENCE_BUCKET))
        )
        self._anchors = [term.copy() for term in self._terms]
        self._term_weight = _FIRST_TERM_WEIGHT
        self.hazards = self._predict()  # [num_buckets, num_settings, max_draft_length]

    def fit(self, examined: Floats, accepted: Floats, sweeps: int) -> None:
        """Newton steps, term by term, from where the last fit ended. Both: AcceptanceAxes.shape."""
        cells = np.nonzero(examined > _LEAST_EXAMINED)
        counts = examined[cells]
        shares = 1.0 / (1.0 + counts / CELL_WEIGHT)
        counts, hits = counts * shares, accepted[cells] * shares
        entries = [entry[cells] for entry in self._entries]
        logits = self._measured[cells] + sum(
            term[entry] for term, entry in zip(self._terms, entries, strict=True)
        )
        weights = (_LEVEL_WEIGHT, *(self._term_weight for _ in self._terms[1:]))
        for _ in range(sweeps):
            for term, anchor, entry, weight in zip(
                self._terms, self._anchors, entries, weights, strict=True
            ):
                hazards = sigmoid(logits)
                slope = np.bincount(entry, hits - counts * hazards, len(term))
                bend = np.bincount(entry, counts * hazards * (1.0 - hazards), len(term))
                step = (slope - weight * (term - anchor)) / (bend + weight)
                step = np.clip(step, -_MAX_STEP, _MAX_STEP)
                term += step
                logits = logits + step[entry]
        self.hazards = self._predict()

    def fade(self, share: float) -> None:
        """So much of the evidence is gone: the anchors take over what it had taught."""
        for anchor, term in zip(self._anchors, self._terms, strict=True):
            anchor += share * (term - anchor)

    def restart(self) -> None:
        """From now on the terms are drawn to what they are, a little less: who is better than whom
        outlives a change of the level, and the level itself is the last one known."""
        level, *others = self._terms
        self._anchors = [level.copy(), *((1.0 - _RETURN) * term for term in others)]
        self._term_weight = _TERM_WEIGHT

    def _predict(self) -> Floats:
        terms = sum(term[entry] for term, entry in zip(self._terms, self._entries, strict=True))
        return sigmoid(self._measured + terms)
