"""What was chosen for one round, and what became of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from magicdec.batch import Plan
from magicdec.config import MAX_DRAFT_LENGTH

_PLAIN_STANDS = 4  # rounds that a plain choice is good for: they show nothing of any drafter
# Any choice stands for as many rounds as make weighing it a small share of the time, up to that.
_WEIGHING_SECONDS, _WEIGHING_SHARE, _MOST_STAND = 0.0015, 0.015, 8


@dataclass(frozen=True, slots=True)
class RoundChoice:
    """The plan of a round, and the requests that draft another length than it says."""

    plan: Plan
    draft_lengths: Mapping[str, int] = field(default_factory=dict)  # by request key
    explores: bool = False
    explores_unseen: bool = False  # what is otherwise not seen: see ExplorationAccount
    predicted_seconds: float = math.nan  # NaN, all three: nothing decodes
    predicted_tokens: float = math.nan
    set_aside_rate: float = math.nan  # tokens/s of the best choice known; an exploring round's loss

    def draft_length(self, request_key: str) -> int:
        return self.draft_lengths.get(request_key, self.plan.draft_length)

    @property
    def num_rounds(self) -> int:
        """That the choice is good for, while the requests are the same; it has a prediction."""
        if self.explores:
            return 1
        return max(_PLAIN_STANDS if self.plan.draft_length == 0 else 1, self._num_hurried)

    @property
    def is_short(self) -> bool:
        """Whether weighing every such round would take much of the time."""
        return self._num_hurried > 1

    @property
    def _num_hurried(self) -> int:
        rounds = round(_WEIGHING_SECONDS / (_WEIGHING_SHARE * self.predicted_seconds))
        return max(1, min(rounds, _MOST_STAND))


class RowOutcome(NamedTuple):
    """What became of one decode row, as the plan had it.

    `draft_length` is what its drafter was asked for; None: as many as it proposed. A row that went
    by its request's own wish has (0, 0); what it showed is for AcceptanceModel.observe.
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    draft_length: int | None = None

    @property
    def is_possible(self) -> bool:
        return 0 <= self.num_accepted_tokens <= self.num_draft_tokens <= MAX_DRAFT_LENGTH
