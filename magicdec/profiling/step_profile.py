"""What one machine's steps cost: a CostModel, and by how much the linears depart from its ridge."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from magicdec.cost_model import VERIFY, CostModel, StepShape, draft_kind
from magicdec.draft_choice import TRAITS

# Beside VERIFY and draft_kind(name), the kinds of cost that rounds are made of.
PREFILL = "prefill"  # a chunk's rows and products: it counts no K/V bytes and no sequences

MAX_CURVE_ROWS = 64  # up to which the linears are timed row by row
_CURVE_END = 2 * MAX_CURVE_ROWS  # where they compute, and the model alone holds
_LEAST_SHARE = 0.25  # of the model's time, that no departure goes below


def begin_kind(drafter: str) -> str:
    """What a drafter does once a round, however many steps follow."""
    return f"begin:{drafter}"


def prompt_kind(drafter: str) -> str:
    """What choosing a view by a prompt's last rows adds to their forward."""
    return f"prompt:{drafter}"


def observe_kind(drafter: str) -> str:
    """What choosing a view by the rows of a round adds to their forward."""
    return f"observe:{drafter}"


# Forwards of the target's weights.
FORWARDS = frozenset(
    (VERIFY, PREFILL, *(draft_kind(name) for name, traits in TRAITS.items() if traits.reads_view))
)


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds of every kind of step.

    Matrix products of few rows take other times than reading the weights or computing on them:
    libraries change their ways from one row to many. `row_seconds` are (rows, seconds) at which a
    forward of the target takes so much longer than the model says, or shorter; between them and
    down to nothing at _CURVE_END it is interpolated. `num_shapes` were timed; None: nothing was.
    Raises ValueError for rows that do not ascend from 1 to MAX_CURVE_ROWS, and for seconds that are
    not finite.
    """

    model: CostModel
    row_seconds: tuple[tuple[int, float], ...] = ()
    num_shapes: int | None = None
    _departures: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [num_rows for num_rows, _ in self.row_seconds]
        if any(a >= b for a, b in pairwise([0, *rows, MAX_CURVE_ROWS + 1])):
            raise ValueError(f"row_seconds must ascend from 1 to {MAX_CURVE_ROWS} rows, got {rows}")
        if not all(math.isfinite(seconds) for _, seconds in self.row_seconds):
            raise ValueError(f"row_seconds must be finite, got {self.row_seconds}")
        object.__setattr__(self, "_departures", _interpolated(self.row_seconds))

    def seconds(self, kind: str, shape: StepShape) -> float:
        """Raises KeyError naming the kinds that are known."""
        modelled = self.model.cost(kind).seconds(shape)
        return self._with_departure(modelled, shape.num_rows) if kind in FORWARDS else modelled

    def seconds_by_rows(self, kind: str, plain: StepShape, most_rows: int) -> list[float]:
        """The same of 1, 2, ... most_rows rows a sequence at once, where `plain` has one row."""
        cost, count = self.model.cost(kind), plain.num_rows
        rest = cost.fixed + cost.per_kv_byte * plain.kv_bytes
        rest += cost.per_sequence * plain.num_sequences
        linears, products = cost.per_row * count, cost.per_row_product * plain.row_products
        modelled = [
            rest + max(cost.weights, n * linears) + n * products for n in range(1, most_rows + 1)
        ]
        if kind not in FORWARDS:
            return modelled
        return [self._with_departure(t, n * count) for n, t in enumerate(modelled, start=1)]

    def known_seconds(self, kind: str, shape: StepShape) -> float:
        """0 for a kind without a cost: not every drafter begins or observes."""
        return self.seconds(kind, shape) if kind in self.model.costs else 0.0

    def read_seconds(self, kind: str, shape: StepShape) -> float:
        """The part of `seconds` that reading K/V is: not more, where a departure took from it."""
        return min(self.model.cost(kind).per_kv_byte * shape.kv_bytes, self.seconds(kind, shape))

    def added_seconds(self, num_rows: int, chunk: StepShape) -> float:
        """What a prefill chunk adds to a forward of so many decode rows; without any, all that it
        takes."""
        if chunk.num_rows == 0:
            return 0.0
        if num_rows == 0:
            return self.seconds(PREFILL, chunk)
        verify, prefill = self.model.cost(VERIFY), self.model.cost(PREFILL)
        linears = verify.per_row * num_rows
        together = linears + prefill.per_row * chunk.num_rows
        added = max(verify.weights, together) - max(verify.weights, linears)
        added += self.departure(num_rows + chunk.num_rows) - self.departure(num_rows)
        return max(added, 0.0) + prefill.per_row_product * chunk.row_products

    def departure(self, num_rows: int) -> float:
        """Seconds that a forward of so many rows takes beyond the model's."""
        return self._departures[num_rows] if num_rows < _CURVE_END else 0.0

    def _with_departure(self, modelled: float, num_rows: int) -> float:
        if num_rows >= _CURVE_END:
            return modelled
        return max(modelled + self._departures[num_rows], _LEAST_SHARE * modelled)


def _interpolated(row_seconds: Iterable[tuple[int, float]]) -> tuple[float, ...]:
    """By rows, [_CURVE_END]."""
    rows, seconds = zip(*row_seconds, (_CURVE_END, 0.0), strict=True)
    return tuple(np.interp(np.arange(_CURVE_END), rows, seconds).tolist())
