"""Who decides what a simulated replica drafts: the engine's own controller, or a fixed length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.batch import Plan
from magicdec.config import MAX_DRAFT_LENGTH, ConfigError, check_at_least, check_at_most
from magicdec.control.draft_length import DraftController
from magicdec.control.round_choice import RoundChoice, RowOutcome
from magicdec.control.round_costs import RoundCosts, RoundLoad

VIEW_DRAFTERS = ("streaming", "snapkv", "recycled")  # the target over draft_budget positions

_KINDS_PER_DOUBLING = 2  # loads closer than that keep a choice while it lasts


class Drafting(Protocol):
    """Of one replica. `choose`, run some rounds, at most `most_rounds`, `observe` the first."""

    def choose(self, load: RoundLoad) -> RoundChoice: ...

    @property
    def most_rounds(self) -> float: ...

    def observe(self, outcomes: Sequence[RowOutcome], num_rounds: int, seconds: float) -> None:
        """Outcomes of the first of these rounds, in the order of the load's decode rows, and the
        seconds that its decode rows took."""
        ...


class FixedDrafting:
    def __init__(self, plan: Plan) -> None:
        self._choice = RoundChoice(plan)

    def choose(self, load: RoundLoad) -> RoundChoice:
        return self._choice

    @property
    def most_rounds(self) -> float:
        return math.inf

    def observe(self, outcomes: Sequence[RowOutcome], num_rounds: int, seconds: float) -> None:
        pass


class AdaptiveDrafting:
    """DraftController, asked once in `rounds_per_choice` rounds of loads alike.

    With 1 it is asked before every round and told every outcome, as in the engine. With more it is
    told one round of each choice, so it learns and explores that much more slowly, never more.
    Loads are alike whose decode rows and summed contexts are within a factor of 1.4; what explores
    is for one round. The controller sees decode rows alone, as round_policy.py has it: prompts take
    their time whatever is drafted.
    """

    def __init__(self, controller: DraftController, rounds_per_choice: int) -> None:
        self.controller = controller
        self._rounds_per_choice = rounds_per_choice
        self._num_rounds = 0
        self._choices: dict[tuple[int, ...], _Chosen] = {}
        self._chosen: _Chosen | None = None  # for the rounds that are run now

    def choose(self, load: RoundLoad) -> RoundChoice:
        kind = _kind(load)
        chosen = self._choices.get(kind)
        if chosen is None or chosen.until <= self._num_rounds:
            load = replace(load, num_prefill_rows=0, prefill_products=0.0)
            choice = self.controller.choose(load)
            lasts = 1 if choice.explores else self._rounds_per_choice
            chosen = self._choices[kind] = _Chosen(choice, load, self._num_rounds + lasts)
        self._chosen = chosen
        return chosen.choice

    @property
    def most_rounds(self) -> float:
        return 1 if self._chosen is None else self._chosen.until - self._num_rounds

    def observe(self, outcomes: Sequence[RowOutcome], num_rounds: int, seconds: float) -> None:
        self._num_rounds += num_rounds
        chosen = self._chosen
        if chosen is not None and chosen.load is not None:
            self.controller.observe(chosen.load, chosen.choice, outcomes, seconds)
            chosen.load = None


@dataclass(slots=True)
class _Chosen:
    choice: RoundChoice
    load: RoundLoad | None  # until its outcomes are known
    until: int  # in rounds


@dataclass(frozen=True, slots=True)
class Drafts:
    """What all replicas draft. Raises ConfigError naming field, value and limit."""

    draft_length: int | None = None  # None: adaptive
    drafter: str = "recycled"
    draft_budget: int = 512  # KV positions that a draft step reads
    max_draft_length: int = MAX_DRAFT_LENGTH  # of adaptive ones
    rounds_per_choice: int = 1  # of adaptive ones

    def __post_init__(self) -> None:
        if self.draft_length is not None:
            check_at_least("draft_length", self.draft_length, 0)
            check_at_most("draft_length", self.draft_length, MAX_DRAFT_LENGTH)
        if self.drafter not in VIEW_DRAFTERS:
            raise ConfigError(
                f"drafter must be one of {', '.join(VIEW_DRAFTERS)} here, got {self.drafter!r}"
            )
        check_at_least("draft_budget", self.draft_budget, 1)
        check_at_least("rounds_per_choice", self.rounds_per_choice, 1)
        self._axes()

    @classmethod
    def parse(cls, text: str, drafter: str, draft_budget: int, rounds_per_choice: int) -> "Drafts":
        """`adaptive` or a draft length. Raises ConfigError."""
        if text != "adaptive" and not text.isdecimal():
            raise ConfigError(f"draft must be adaptive or a draft length, got {text!r}")
        length = None if text == "adaptive" else int(text)
        return cls(length, drafter, draft_budget, rounds_per_choice=rounds_per_choice)

    @property
    def name(self) -> str:
        return "adaptive" if self.draft_length is None else str(self.draft_length)

    def drafting(self, costs: RoundCosts) -> Drafting:
        """Of one replica."""
        if self.draft_length is not None:
            return FixedDrafting(Plan(self.drafter, self.draft_length, self.draft_budget))
        controller = DraftController(AcceptanceModel(self._axes()), costs)
        return AdaptiveDrafting(controller, self.rounds_per_choice)

    def _axes(self) -> AcceptanceAxes:
        return AcceptanceAxes((self.drafter,), (self.draft_budget,), self.max_draft_length)


def _kind(load: RoundLoad) -> tuple[int, ...]:
    sizes = (len(load.context_lens), sum(load.context_lens))
    return tuple(round(_KINDS_PER_DOUBLING * math.log2(1.0 + size)) for size in sizes)
