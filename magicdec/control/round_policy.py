"""What an engine asks before every step and tells after it: who drafts, how far, over how much."""

from dataclasses import dataclass, replace
from typing import Protocol

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.batch import Batch, DraftChoice, Plan, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import AdaptiveConfig, SpeculativeConfig
from magicdec.control.draft_length import ControllerConfig, DraftController
from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_choice import RoundChoice, RowOutcome
from magicdec.control.round_costs import RoundLoad
from magicdec.drafters.self_draft import POLICIES
from magicdec.stats import StepForecast

_LEAST_PREFILL_ROWS = 64  # of a step, whatever the target: prompts get on
_PREFILL_STEP = 32  # rows; the target is not met more finely


class RoundPolicy(Protocol):
    """One engine's; its thread owns it."""

    def choose(self, load: RoundLoad) -> Plan:
        """The step's plan."""
        ...

    def forecast(self) -> StepForecast | None:
        """What was foreseen of the step that was chosen last; None: nothing is. Ask before
        `observe`."""
        ...

    def observe(self, batch: Batch, result: StepResult, seconds: float) -> None:
        """What came of it; `seconds` are those of the whole step."""
        ...

    def snapshot(self) -> PolicySnapshot | None:
        """What was learnt here, for other engines; None: nothing is learnt."""
        ...

    def merge(self, others: PolicySnapshot) -> None:
        """What other engines have learnt, in place of what was merged before."""
        ...


@dataclass(slots=True)
class FixedPolicy:
    """Every step alike."""

    plan: Plan

    @classmethod
    def of(cls, config: SpeculativeConfig) -> "FixedPolicy":
        return cls(Plan(config.drafter, config.draft_length, config.draft_budget, stands=True))

    def choose(self, load: RoundLoad) -> Plan:
        return self.plan

    def forecast(self) -> StepForecast | None:
        return None

    def observe(self, batch: Batch, result: StepResult, seconds: float) -> None:
        pass

    def snapshot(self) -> PolicySnapshot | None:
        return None

    def merge(self, others: PolicySnapshot) -> None:
        pass


class DecodeCosts:
    """Implements RoundCosts: what decode rows add to the prefill chunks beside them.

    A chunk takes its time in this step or in a later one, whatever is drafted. Were it in the sum,
    long drafts would seem cheap beside it, and the prompts would wait for them.
    """

    def __init__(self, costs: ProfiledRoundCosts) -> None:
        self._costs = costs

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        """See RoundCosts."""
        whole = self._costs.seconds(load, drafter, draft_length, draft_budget)
        return whole - self._costs.prefill_seconds(load)


class AdaptivePolicy:
    """The controller of draft_length.py over the costs of this machine.

    It also holds a step with prefill to inter_token_target_s while anybody decodes.
    """

    def __init__(
        self, config: SpeculativeConfig, adaptive: AdaptiveConfig, costs: ProfiledRoundCosts
    ) -> None:
        axes = AcceptanceAxes(adaptive.drafters, adaptive.draft_budgets, config.max_draft_length)
        self.controller = DraftController(
            AcceptanceModel(axes),
            DecodeCosts(costs),
            ControllerConfig(
                exploration_share=adaptive.exploration_share, max_view_share=config.max_view_share
            ),
        )
        self.costs = costs
        # A prompt's rows are seen once, whoever drafts when its answer begins.
        observing = [n for n in adaptive.drafters if n in POLICIES and POLICIES[n].observes_prompt]
        self._prompt_drafter = observing[0] if observing else None
        self._target_s = adaptive.inter_token_target_s
        first = axes.served_settings()[0]
        self.chosen = RoundChoice(Plan(axes.name(first)[0], 0, axes.name(first)[1]))
        self._load = RoundLoad(())
        self._foreseen: tuple[RoundChoice, StepForecast] | None = None

    def choose(self, load: RoundLoad) -> Plan:
        """See RoundPolicy."""
        self._load = self._within_target(load)
        self.chosen = self.controller.choose(self._load)
        return replace(
            self.chosen.plan,
            draft_lengths=self.chosen.draft_lengths,
            max_prefill_rows=self._load.num_prefill_rows,
            prompt_drafter=self._prompt_drafter,
            explores=self.chosen.explores,
            stands=self._stands(),
        )

    def _stands(self) -> bool:
        """Drafts are chosen anew each round, and seldom others: a trial alone is sure to end."""
        if self.chosen.plan.draft_length == 0:
            return self.controller.stands
        return not self.chosen.explores

    def forecast(self) -> StepForecast:
        """See RoundPolicy. A choice that stands for several rounds was foreseen once."""
        if self._foreseen is None or self._foreseen[0] is not self.chosen:
            self._foreseen = self.chosen, self._forecast()
        return self._foreseen[1]

    def _forecast(self) -> StepForecast:
        load, plan = self._load, self.chosen.plan
        prefill = self.costs.prefill_seconds(load)
        decodes = bool(load.context_lens)  # otherwise the choice has no prediction
        return StepForecast(
            seconds=prefill + self.chosen.predicted_seconds if decodes else prefill,
            plain_seconds=self.costs.seconds(load, plan.drafter, 0, plan.draft_budget),
            prefill_seconds=prefill,
            bounds=self.costs.bounds(load, plan.draft_length),
        )

    def observe(self, batch: Batch, result: StepResult, seconds: float) -> None:
        """See RoundPolicy."""
        if not self.controller.hurries:
            self.costs.observe(batch, result)
            self.costs.overhead.observe(
                seconds - result.draft_seconds - result.verify_seconds,
                drafted=any(s.draft_length > 0 for s in batch.sequences),
            )
        rows = [
            (share, outcome)
            for share, outcome in zip(batch.sequences, result.sequences, strict=True)
            if share.is_decode_row
        ]
        if not rows:
            return
        load, chosen = self._load, self.chosen
        outcomes = []
        for (share, outcome), key, limit in zip(
            rows, load.request_keys, load.draft_limits, strict=True
        ):
            if limit > 0:
                outcomes.append(_outcome(share, outcome))
                continue
            outcomes.append(RowOutcome(0, 0))
            if share.draft is not None and share.draft.draft_length > 0:
                self._observe_wish(share.draft, share.num_tokens, outcome, key)
        # The prefill's part of the time is as it was predicted, and so is the rest of it.
        prefill = self.costs.prefill_seconds(load)
        whole = prefill + chosen.predicted_seconds
        self.controller.observe(load, chosen, outcomes, seconds * chosen.predicted_seconds / whole)

    def snapshot(self) -> PolicySnapshot:
        """See RoundPolicy."""
        return PolicySnapshot(
            self.controller.acceptance.snapshot(),
            self.costs.observed_factors,
            self.controller.num_dropped + self.costs.num_dropped,
        )

    def merge(self, others: PolicySnapshot) -> None:
        """See RoundPolicy."""
        self.controller.acceptance.merge(others.acceptance)
        self.costs.begin_at(others.cost_factors)

    def _observe_wish(
        self, draft: DraftChoice, context_len: int, outcome: SequenceResult, key: str
    ) -> None:
        """A row that went by its request's own wish shows what its drafter is worth, too."""
        acceptance = self.controller.acceptance
        if draft.drafter in acceptance.axes.drafters:
            counts = outcome.num_draft_tokens, outcome.num_accepted_tokens
            acceptance.observe(draft.drafter, draft.draft_budget, context_len, *counts, key)

    def _within_target(self, load: RoundLoad) -> RoundLoad:
        """With as many prefill rows as end the step in time, drafts as in the last one."""
        most = load.num_prefill_rows
        if not load.context_lens or most <= _LEAST_PREFILL_ROWS:
            return load
        low, high = _LEAST_PREFILL_ROWS // _PREFILL_STEP, -(-most // _PREFILL_STEP)
        while low < high:
            middle = (low + high + 1) // 2
            if self._seconds(_with_prefill(load, middle * _PREFILL_STEP)) <= self._target_s:
                low = middle
            else:
                high = middle - 1
        return _with_prefill(load, low * _PREFILL_STEP)

    def _seconds(self, load: RoundLoad) -> float:
        plan = self.chosen.plan
        return self.costs.seconds(load, plan.drafter, plan.draft_length, plan.draft_budget)


def _with_prefill(load: RoundLoad, num_rows: int) -> RoundLoad:
    """The same load with fewer rows of the same prompts."""
    rows = min(num_rows, load.num_prefill_rows)
    share = rows / load.num_prefill_rows
    return replace(load, num_prefill_rows=rows, prefill_products=share * load.prefill_products)


def _outcome(share: ScheduledSequence, result: SequenceResult) -> RowOutcome:
    return RowOutcome(result.num_draft_tokens, result.num_accepted_tokens, share.draft_length)
