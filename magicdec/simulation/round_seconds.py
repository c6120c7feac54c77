"""What a simulated round takes: what the cost model says of it, for any draft lengths."""

import math
from collections.abc import Callable, Sequence

from magicdec.batch import Plan
from magicdec.control.round_costs import RoundCosts, RoundLoad

LEAST_PREFILL_ROWS = 64  # of a step, however slow it gets
_STEPS_PER_DOUBLING = 48  # loads closer than that take the same time: within 1.5 %


class RememberedCosts:
    """Implements RoundCosts: a cost model that is asked once for loads alike.

    Thousands of replicas see the same loads again and again. Alike are as many decode rows, whose
    contexts and whose prompts' rows and products are the same to a step of a doubling.
    """

    def __init__(self, costs: RoundCosts) -> None:
        self._costs = costs
        self._known: dict[tuple[int, ...], dict[tuple[str, int, float], float]] = {}
        self._load: RoundLoad | None = None  # that was asked about last
        self._of_load: dict[tuple[str, int, float], float] = {}

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        if load is not self._load:
            self._of_load = self._known.setdefault(_kind(load), {})
            self._load = load
        choice = (drafter, draft_length, draft_budget)
        seconds = self._of_load.get(choice)
        if seconds is None:
            seconds = self._of_load[choice] = self._costs.seconds(load, *choice)
        return seconds


def _kind(load: RoundLoad) -> tuple[int, ...]:
    steps, log2 = _STEPS_PER_DOUBLING, math.log2
    contexts, rows = sum(load.context_lens), load.num_prefill_rows
    kind = (len(load.context_lens), int(steps * log2(1 + contexts)))
    if not rows:
        return kind
    return (*kind, int(steps * log2(rows)), int(steps * log2(1.0 + load.prefill_products / rows)))


def round_seconds(
    costs: RoundCosts, load: RoundLoad, plan: Plan, draft_lengths: Sequence[int]
) -> float:
    """Seconds of a round whose decode rows draft `draft_lengths` (one a row).

    Rows that draft nothing save their part of the draft steps; those that stop early run on beside
    the others and save verify rows, as request_lengths.py has it.
    """
    longest = max(draft_lengths, default=0)
    rest = (plan.drafter, longest, plan.draft_budget)
    plain = (plan.drafter, 0, plan.draft_budget)
    if longest == 0 or min(draft_lengths) == longest:
        return costs.seconds(load, *rest)
    seconds = costs.seconds(load, *plain)
    drafting = [row for row, length in enumerate(draft_lengths) if length > 0]
    num_missing = sum(longest - draft_lengths[row] for row in drafting)
    if num_missing > 0:
        num_rows = len(load.context_lens)
        wider = costs.seconds(load.with_rows(num_rows, sum(load.context_lens)), *plain)
        seconds_saved = num_missing * max(wider - seconds, 0.0) / num_rows
    else:
        seconds_saved = 0.0
    alone = load.drafting(drafting) if len(drafting) < len(draft_lengths) else load
    added = costs.seconds(alone, *rest) - costs.seconds(alone, *plain)
    return seconds + max(added - seconds_saved, 0.0)


def most_rows_within(seconds_of: Callable[[int], float], num_rows: int, target_s: float) -> int:
    """The most prefill rows, up to `num_rows`, of a round that takes no longer than `target_s`;
    LEAST_PREFILL_ROWS of them at least. `seconds_of` must not fall."""
    low, high = min(LEAST_PREFILL_ROWS, num_rows), num_rows
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_of(middle) <= target_s:
            low = middle
        else:
            high = middle - 1
    return low
