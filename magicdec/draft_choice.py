"""What one sequence drafts this round: the plan, the request's own wish, the server's limits."""

from dataclasses import dataclass

from magicdec.batch import DraftChoice, Plan
from magicdec.config import DRAFTERS, SpeculativeConfig
from magicdec.sequence import Sequence
from magicdec.types import AUTO, Request, RequestError, SpeculationParams

_BUDGET_STEP = 64  # a share of a growing context is rounded up, so that views keep their shape


@dataclass(frozen=True, slots=True)
class DrafterTraits:
    """What scheduling must know of a drafter; everything else is its own business."""

    reads_view: bool  # drafts with the target's weights over draft_budget positions of its cache
    needs_history: bool  # of every token so far


TRAITS = {
    "streaming": DrafterTraits(reads_view=True, needs_history=False),
    "snapkv": DrafterTraits(reads_view=True, needs_history=False),
    "recycled": DrafterTraits(reads_view=True, needs_history=False),
    "draft_model": DrafterTraits(reads_view=False, needs_history=True),
    "ngram": DrafterTraits(reads_view=False, needs_history=True),
    # The table's upper bound reads every key to choose its view: for measuring, never served.
    "top_k": DrafterTraits(reads_view=True, needs_history=False),
}


def check_speculation(params: SpeculationParams, config: SpeculativeConfig) -> None:
    """Raises RequestError naming the field, its value and the server's limit."""
    if params.drafter is not None and params.drafter not in (AUTO, *DRAFTERS):
        names = ", ".join((AUTO, *DRAFTERS))
        _refuse("drafter", f"must be one of {names}, got {params.drafter[:40]!r}")
    if params.drafter == "draft_model" and config.draft_model is None:
        _refuse("drafter", "draft_model is not served: this server has no draft model")
    length, budget = params.draft_length, params.draft_budget
    if length is not None and not 0 <= length <= config.max_draft_length:
        _refuse("draft_length", f"must be between 0 and {config.max_draft_length}, got {length}")
    if budget is None:
        return
    if not 0 < budget <= config.max_draft_budget:
        _refuse(
            "draft_budget", f"must be above 0 and at most {config.max_draft_budget}, got {budget}"
        )
    if budget >= 1 and budget != int(budget):
        _refuse("draft_budget", f"must be whole, or a share of the context below 1, got {budget}")
    least = config.least_draft_budget(config.draft_length if length is None else length)
    if 1 <= budget < least:
        _refuse(
            "draft_budget",
            f"must be at least {least} (sink, recent positions and draft length), got {budget}",
        )


class DraftChoices:
    """Of one step's plan: the request's wish where it has one, the plan elsewhere.

    Rows that are alike share a choice: most of a batch are.
    """

    def __init__(self, plan: Plan, config: SpeculativeConfig) -> None:
        self._plan = plan
        self._config = config
        self._made: dict[tuple[str, int, int, bool], DraftChoice] = {}

    def choose(self, request: Request, context_len: int) -> DraftChoice | None:
        """None where speculation is off.

        draft_length is 0 where the view would be too much of the context to pay.
        """
        params, plan = request.speculation, self._plan
        if not params.enabled:
            return None
        drafter, wish, length = params.drafter, params.draft_budget, params.draft_length
        if drafter is None or drafter == AUTO:
            drafter = plan.drafter
        if wish is None:
            wish = plan.draft_budget
        if length is None:
            length = plan.draft_length_of(request.request_id)
        budget, traits = self._budget(wish, length, context_len), TRAITS[drafter]
        most = self._config.max_view_share * context_len
        if length == 0 or (traits.reads_view and min(budget, context_len) > most):
            return self._make(drafter, 0, budget, False)
        return self._make(drafter, length, budget, traits.needs_history)

    def with_length(self, draft: DraftChoice, length: int) -> DraftChoice:
        """The same drafter, which reads the same, with another number of tokens to draft."""
        if length == draft.draft_length:
            return draft
        return self._make(draft.drafter, length, draft.draft_budget, draft.needs_history)

    def goes_on(self, draft: DraftChoice, sequence: Sequence, max_model_len: int) -> bool:
        """Whether the round after one that drafts so may draft alike, however much is accepted."""
        longest = len(sequence.token_ids) + draft.draft_length + 1
        then = self.choose(sequence.request, longest)
        if then is None or longest + draft.draft_length > max_model_len:
            return False
        return (then.drafter, then.draft_budget) == (draft.drafter, draft.draft_budget)

    def _budget(self, wish: float, length: int, context_len: int) -> int:
        budget = int(wish)
        if wish < 1:
            steps = -(-int(wish * context_len) // _BUDGET_STEP)
            budget = min(steps * _BUDGET_STEP, self._config.max_draft_budget)
        least = self._config.least_draft_budget(length)
        return budget if budget > least else least

    def _make(self, drafter: str, length: int, budget: int, needs_history: bool) -> DraftChoice:
        key = (drafter, length, budget, needs_history)
        made = self._made.get(key)
        if made is None:
            made = DraftChoice(*key, may_refresh=not self._plan.explores)
            self._made[key] = made
        return made


def _refuse(field: str, reason: str) -> None:
    raise RequestError(f"speculation.{field} {reason}", param=f"speculation.{field}")
