"""What steps came to, counted for those who watch: who drafted, what was accepted, where time went.

The engine's thread adds a step in microseconds and hands the whole over when it is asked. Only
counts by label are kept, so that nothing grows with the number of steps.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from magicdec.acceptance.prior import context_bucket
from magicdec.batch import Batch, Plan, StepResult
from magicdec.control.step_bounds import BOUNDS
from magicdec.stats import EngineLoad, EngineStats, KvBlocks, StepForecast

NO_DRAFTER = "none"


class RoundKind(NamedTuple):
    """What a round's plan was. `draft_budget` is 0 where nothing is drafted."""

    drafter: str
    draft_length: int
    draft_budget: float
    explores: bool

    @classmethod
    def of(cls, plan: Plan) -> "RoundKind":
        if plan.draft_length == 0 and not any(plan.draft_lengths.values()):
            return cls(NO_DRAFTER, 0, 0.0, plan.explores)
        return cls(plan.drafter, plan.draft_length, plan.draft_budget, plan.explores)


class RowKind(NamedTuple):
    """What became of a decode row. `context`: its bucket (acceptance/prior.py)."""

    drafter: str
    context: int
    num_drafted: int
    num_accepted: int


class StepCounts(NamedTuple):
    """Of one step. Accepted and drafted tokens are its decode rows'."""

    num_decode_rows: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_emitted_tokens: int  # of decode rows alone
    num_prefill_tokens: int


@dataclass(slots=True)
class RoundTally:
    """Since it was made. Times in seconds; `predicted_...` are zero without a cost model."""

    rounds: Counter[RoundKind] = field(default_factory=Counter)
    rows: Counter[RowKind] = field(default_factory=Counter)
    num_emitted_tokens: int = 0
    num_verify_positions: int = 0  # of K/V that verify passes read for decode rows
    num_draft_positions: int = 0  # that draft steps read at most
    step_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    stall_seconds: float = 0.0  # that prompts' rows added to steps with decode rows
    foreseen_step_seconds: float = 0.0  # of steps that had a forecast, as measured
    predicted_step_seconds: float = 0.0
    forecast_error_seconds: float = 0.0  # the sum of how far each was off
    plain_seconds: float = 0.0  # that plain decoding would take for the tokens of those steps
    bounds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOUNDS, 0.0))
    tally_seconds: float = 0.0  # that this took

    def add(
        self,
        batch: Batch,
        result: StepResult,
        plan: Plan,
        foresee: Callable[[], StepForecast | None],
        seconds: float,
    ) -> StepCounts:
        """One step that ran; `seconds` are those of all of it. What was foreseen of it is asked for
        here, so that its time counts as this one's."""
        started = time.perf_counter()
        forecast = foresee()
        self.step_seconds += seconds
        self.draft_seconds += result.draft_seconds
        self.verify_seconds += result.verify_seconds
        counts = self._add_rows(batch, result)
        num_rows, num_prefill_rows = counts.num_decode_rows, counts.num_prefill_tokens
        if num_rows > 0:
            self.rounds[RoundKind.of(plan)] += 1
            if num_prefill_rows > 0:
                num_verify_rows = num_rows + counts.num_draft_tokens
                share_of_rows = num_prefill_rows / (num_prefill_rows + num_verify_rows)
                self.stall_seconds += _stall(forecast, share_of_rows, seconds)
        if forecast is not None:
            tokens_a_row = counts.num_emitted_tokens / num_rows if num_rows else 1.0
            self._add_forecast(forecast, seconds, tokens_a_row)
        self.tally_seconds += time.perf_counter() - started
        return counts

    def _add_rows(self, batch: Batch, result: StepResult) -> StepCounts:
        kinds: list[tuple[str, int, int, int]] = []
        drafted = accepted = emitted = num_prefill_rows = 0
        for share, outcome in zip(batch.sequences, result.sequences, strict=True):
            num_emitted = len(outcome.token_ids)
            self.num_emitted_tokens += num_emitted
            if not share.is_decode_row:
                num_prefill_rows += len(share.token_ids)
                continue
            num_tokens, draft = share.num_computed_tokens + 1, share.draft
            num_drafted, num_accepted = len(outcome.draft_token_ids), outcome.num_accepted_tokens
            emitted += num_emitted
            drafted += num_drafted
            accepted += num_accepted
            self.num_verify_positions += num_tokens
            drafter = NO_DRAFTER
            if num_drafted > 0 and draft is not None:
                drafter = draft.drafter
                self.num_draft_positions += num_drafted * min(draft.draft_budget, num_tokens)
            # A bucket is a power of two: contexts of as many bits are in the same.
            kinds.append((drafter, num_tokens.bit_length(), num_drafted, num_accepted))
        for (drafter, bits, *numbers), count in Counter(kinds).items():
            self.rows[RowKind(drafter, context_bucket((1 << bits) - 1), *numbers)] += count
        return StepCounts(len(kinds), drafted, accepted, emitted, num_prefill_rows)

    def _add_forecast(self, forecast: StepForecast, seconds: float, tokens_a_row: float) -> None:
        self.foreseen_step_seconds += seconds
        self.predicted_step_seconds += forecast.seconds
        self.forecast_error_seconds += abs(seconds - forecast.seconds)
        decode = forecast.plain_seconds - forecast.prefill_seconds
        self.plain_seconds += forecast.prefill_seconds + tokens_a_row * decode
        for bound, part in forecast.bounds.items():
            self.bounds[bound] += part


def _stall(forecast: StepForecast | None, share_of_rows: float, seconds: float) -> float:
    """By the cost model; where there is none, a row of a prompt counts as one that decodes."""
    if forecast is None or not forecast.seconds > 0.0:
        return seconds * share_of_rows
    return seconds * min(forecast.prefill_seconds / forecast.seconds, 1.0)


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """An engine as those who watch it see it: now, since its start, and since they last asked."""

    load: EngineLoad
    blocks: KvBlocks
    stats: EngineStats  # since the start
    tally: RoundTally  # since the last time
