"""What the rounds that could be run now would cost: the controller's view of any cost model."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from magicdec.acceptance.prior import Floats

_MAX_TABLES = 64
_STEPS_PER_DOUBLING = 8  # loads closer than that share a table while its costs hold
_TOLERANCE = 0.02  # by which a cost may move before its table is worked out anew


@dataclass(frozen=True, slots=True)
class RoundLoad:
    """What one round has to do, whoever drafts. Raises ValueError for lists of unequal length.

    `request_keys` names the decode rows' requests; without, none has an offset or a length of its
    own. `draft_limits` are the most tokens that each row may draft: fewer near its end, 0 where
    speculation is off.
    """

    context_lens: tuple[int, ...]  # of the decode rows
    num_prefill_rows: int = 0
    prefill_products: float = 0.0  # sum of rows * context over the prefill chunks
    request_keys: tuple[str, ...] = ()
    draft_limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (
            ("request_keys", self.request_keys),
            ("draft_limits", self.draft_limits),
        ):
            if values and len(values) != len(self.context_lens):
                raise ValueError(
                    f"{name} must be empty or one a decode row ({len(self.context_lens)}), "
                    f"got {len(values)}"
                )

    def is_like(self, other: "RoundLoad") -> bool:
        """The same named requests, none of them being prefilled."""
        named = bool(self.request_keys) and self.request_keys == other.request_keys
        return named and self.num_prefill_rows == other.num_prefill_rows == 0

    def drafting(self, rows: Sequence[int]) -> "RoundLoad":
        """The same verify rows, of which only `rows` are decode rows that may draft.

        The others are plain rows, as those of a prefill chunk. What their KV costs is no longer
        in it, so only differences between draft lengths mean something.
        """
        rest = sum(self.context_lens) - sum(self.context_lens[i] for i in rows)
        return replace(
            self.with_rows(len(self.context_lens) - len(rows), rest),
            context_lens=tuple(self.context_lens[i] for i in rows),
            request_keys=(),
            draft_limits=(),
        )

    def with_rows(self, num_rows: int, products: float) -> "RoundLoad":
        """The same load with more prefill rows."""
        return replace(
            self,
            num_prefill_rows=self.num_prefill_rows + num_rows,
            prefill_products=self.prefill_products + products,
        )


class RoundCosts(Protocol):
    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        """Predicted wall time of the whole round: draft steps, then one verify pass over the
        decode rows with their drafts and the prefill chunks. Every decode row drafts
        draft_length tokens; 0 is the plain step, whoever is named."""
        ...


class RoundCostTable:
    """Costs of all settings and draft lengths, kept for loads alike.

    A few costs of a table are asked for anew each time; when one has moved, by the load's drift or
    by the cost model's correction, the whole table is worked out again, so that the costs that are
    compared are of one age. A cost that is not finite and positive counts as infinite.
    """

    def __init__(
        self, costs: RoundCosts, settings: Sequence[tuple[str, float]], max_draft_length: int
    ) -> None:
        self._costs = costs
        self._settings = list(settings)  # drafter, draft_budget
        self._max_draft_length = max_draft_length
        self._tables: OrderedDict[tuple[int, ...], Floats] = OrderedDict()  # NaN: not asked yet
        drafters = [drafter for drafter, _ in self._settings]
        firsts = sorted({drafters.index(drafter) for drafter in drafters})
        self._watched = [(0, 0), *((first, max_draft_length) for first in firsts)]

    def curves(self, load: RoundLoad) -> Floats:
        """Seconds, [num_settings, max_draft_length + 1]; column 0 is the plain round."""
        table = self._table(load)
        for setting in np.flatnonzero(np.isnan(table[:, -1])):
            self._fill(table, load, int(setting))
        return table

    def curve(self, load: RoundLoad, setting: int) -> Floats:
        """Seconds of one setting, [max_draft_length + 1]."""
        table = self._table(load)
        if math.isnan(table[setting, -1]):
            self._fill(table, load, setting)
        curve: Floats = table[setting]
        return curve

    def plain(self, load: RoundLoad) -> float:
        return self._ask(load, 0, 0)

    def _table(self, load: RoundLoad) -> Floats:
        key = self._key(load)
        table = self._tables.get(key)
        if table is None or not self._holds(table, load):
            table = np.full((len(self._settings), self._max_draft_length + 1), math.nan)
            self._tables[key] = table
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return table

    def _holds(self, table: Floats, load: RoundLoad) -> bool:
        return all(
            math.isclose(table[at], self._ask(load, *at), rel_tol=_TOLERANCE)
            for at in self._watched
            if not math.isnan(table[at])
        )

    def _fill(self, table: Floats, load: RoundLoad, setting: int) -> None:
        if math.isnan(table[0, 0]):
            table[:, 0] = self._ask(load, 0, 0)
        for length in range(1, self._max_draft_length + 1):
            table[setting, length] = self._ask(load, setting, length)

    def _ask(self, load: RoundLoad, setting: int, draft_length: int) -> float:
        drafter, draft_budget = self._settings[setting]
        seconds = self._costs.seconds(load, drafter, draft_length, draft_budget)
        return seconds if 0.0 < seconds < math.inf else math.inf

    def _key(self, load: RoundLoad) -> tuple[int, ...]:
        contexts = load.context_lens
        sizes = (sum(contexts), max(contexts), load.num_prefill_rows, load.prefill_products)
        steps = (round(_STEPS_PER_DOUBLING * math.log2(1.0 + size)) for size in sizes)
        return (len(contexts), *steps)
