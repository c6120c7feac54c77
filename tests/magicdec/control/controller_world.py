"""A simulated machine and text for the controller: true costs, true hazards, both known exactly."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.control.draft_length import ControllerConfig, DraftController
from magicdec.control.round_choice import RoundChoice, RowOutcome
from magicdec.control.round_costs import RoundLoad

VIEWS = ("streaming", "snapkv", "recycled")
BUDGETS = (256, 512, 1024, 2048)
AXES = AcceptanceAxes(VIEWS, BUDGETS)

Hazard = Callable[[str, float, int], float]
"""(drafter, draft_budget, position from 1) -> P(accepted | all before it were)."""


@dataclass(frozen=True)
class Machine:
    """Step times of docs/benchmarks.md (SmolLM2, two cores): 8 x 7,000 tokens take 0.37 s plain,
    0.10 s a draft step over 512, 0.53 s to verify five rows each; 8 x 500: 0.16, 0.10 and 0.20."""

    step: float = 0.052
    per_sequence: float = 0.010
    per_row: float = 0.0013
    per_key: float = 3.5e-6
    per_product: float = 0.54e-6
    draft_step: float = 0.040
    draft_per_sequence: float = 0.0065

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        return self.ragged(load, drafter, [draft_length] * len(load.context_lens), draft_budget)

    def ragged(
        self, load: RoundLoad, drafter: str, lengths: Sequence[int], draft_budget: float
    ) -> float:
        """Rows that draft at all run along through every draft step."""
        contexts = load.context_lens
        drafting = [c for c, length in zip(contexts, lengths, strict=True) if length > 0]
        step = 0.001
        if drafter in VIEWS:
            keys = sum(min(c, draft_budget) for c in drafting)
            step = self.draft_step + self.draft_per_sequence * len(drafting) + self.per_key * keys
        rows = len(contexts) + sum(lengths) + load.num_prefill_rows
        products = sum(c * (1 + n) for c, n in zip(contexts, lengths, strict=True))
        return (
            self.step
            + self.per_sequence * len(contexts)
            + self.per_row * rows
            + self.per_key * sum(contexts)
            + self.per_product * (products + load.prefill_products)
            + max(lengths, default=0) * step
        )


# One H100 or so: steps of 6 ms and more, verify rows almost free.
GPU = Machine(0.006, 2e-5, 1.5e-5, 4e-8, 1e-9, draft_step=0.0045, draft_per_sequence=2e-5)


@dataclass(frozen=True)
class Text:
    """What is being decoded: the same hazards for every row, or a shift in log-odds for each."""

    hazard: Hazard
    contexts: tuple[int, ...]
    shifts: tuple[float, ...] = ()
    name: str = ""  # of its requests

    def load(self) -> RoundLoad:
        keys = tuple(f"{self.name}{i}" for i in range(len(self.contexts)))
        return RoundLoad(self.contexts, request_keys=keys)

    def row_hazard(self, row: int, drafter: str, draft_budget: float, position: int) -> float:
        hazard = self.hazard(drafter, draft_budget, position)
        if not self.shifts or hazard in (0.0, 1.0):
            return hazard
        return 1.0 / (1.0 + math.exp(-self.shifts[row]) * (1.0 - hazard) / hazard)

    def tokens(self, drafter: str, draft_budget: float, lengths: Sequence[int]) -> float:
        """Expected of one round."""
        total = 0.0
        for row, length in enumerate(lengths):
            survival = 1.0
            total += survival
            for position in range(1, length + 1):
                survival *= self.row_hazard(row, drafter, draft_budget, position)
                total += survival
        return total


@dataclass
class Played:
    """One round as it was: rates are true tokens/s, expected, not what came out."""

    choice: RoundChoice
    rate: float
    plain_rate: float
    best_rate: float
    seconds: float
    tokens: int
    true_loss: float  # seconds, of a trial against the choice before it


@dataclass
class World:
    """Plays rounds with a controller that knows the costs up to `cost_error`, not the hazards."""

    controller: DraftController
    machine: Machine = field(default_factory=Machine)
    seed: int = 0
    noise: float = 0.05  # of a measured time, log-normal

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def play(self, text: Text, num_rounds: int) -> list[Played]:
        best = best_rate(self.machine, text)
        plain = plain_rate(self.machine, text)
        played: list[Played] = []
        rate = plain  # of the last choice that was no trial
        for _ in range(num_rounds):
            load = text.load()
            choice = self.controller.choose(load)
            lengths = [choice.draft_length(key) for key in load.request_keys]
            outcomes = list(self._draw(text, choice, lengths))
            true = self.machine.ragged(load, choice.plan.drafter, lengths, choice.plan.draft_budget)
            seconds = true * math.exp(self.noise * self.random.standard_normal())
            self.controller.observe(load, choice, outcomes, seconds)
            expected = text.tokens(choice.plan.drafter, choice.plan.draft_budget, lengths)
            tokens = sum(1 + o.num_accepted_tokens for o in outcomes)
            loss = true - expected / rate if choice.explores else 0.0
            rate = rate if choice.explores else expected / true
            played.append(Played(choice, expected / true, plain, best, seconds, tokens, loss))
        return played

    def outcome(self, drafted: float, accepted: float) -> RowOutcome:
        """Of a row; numbers that cannot be are passed on as they are."""
        return RowOutcome(drafted, accepted)  # type: ignore[arg-type]

    def _draw(
        self, text: Text, choice: RoundChoice, lengths: Sequence[int]
    ) -> Iterator[RowOutcome]:
        for row, length in enumerate(lengths):
            accepted = 0
            while accepted < length and self.random.random() < text.row_hazard(
                row, choice.plan.drafter, choice.plan.draft_budget, accepted + 1
            ):
                accepted += 1
            yield RowOutcome(length, accepted)


def plain_rate(machine: Machine, text: Text) -> float:
    return len(text.contexts) / machine.seconds(text.load(), VIEWS[0], 0, BUDGETS[0])


def best_rate(machine: Machine, text: Text, axes: AcceptanceAxes = AXES) -> float:
    """Tokens/s of the best fixed setting, all rows alike."""
    load, num_rows = text.load(), len(text.contexts)
    rates = [plain_rate(machine, text)]
    for setting in axes.served_settings():
        drafter, budget = axes.name(setting)
        if budget * 3 > min(text.contexts):
            continue
        for length in range(1, axes.max_draft_length + 1):
            tokens = text.tokens(drafter, budget, [length] * num_rows)
            rates.append(tokens / machine.seconds(load, drafter, length, budget))
    return max(rates)


def controller(
    machine: Machine | None = None, axes: AcceptanceAxes = AXES, **config: float
) -> DraftController:
    return DraftController(AcceptanceModel(axes), machine or Machine(), ControllerConfig(**config))


def constant(hazard: float) -> Hazard:
    return lambda drafter, draft_budget, position: hazard


def by_drafter(**hazards: float) -> Hazard:
    """At 512 positions; with every doubling misses are 0.62 of what they were, as in
    docs/acceptance.md."""

    def hazard(drafter: str, draft_budget: float, position: int) -> float:
        return 1.0 - float((1.0 - hazards[drafter]) * 0.62 ** math.log2(draft_budget / 512))

    return hazard


LONG = Text(by_drafter(streaming=0.85, snapkv=0.88, recycled=0.91), (7000,) * 8, name="long")
FACTS = Text(by_drafter(streaming=0.17, snapkv=0.40, recycled=0.80), (7000,) * 8, name="facts")
HARD = Text(constant(0.12), (7000,) * 8, name="hard")
CHAT = Text(constant(0.7), (400,) * 8, name="chat")


def renamed(text: Text, name: str) -> Text:
    return replace(text, name=name)
