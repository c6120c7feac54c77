"""What the profile says of a step that ran, in the parts that its correction tells apart."""

from collections.abc import Sequence

import numpy as np

from magicdec.batch import Batch, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import OBSERVATION_WINDOW
from magicdec.control.round_shapes import RoundShapes
from magicdec.control.step_corrections import COMPUTE, EXTRA_ROWS, READ, Part
from magicdec.cost_model import VERIFY, Floats, StepShape, draft_kind
from magicdec.profiling.step_profile import (
    PREFILL,
    StepProfile,
    begin_kind,
    observe_kind,
    prompt_kind,
)


class StepParts:
    """Of verify forwards, and of all draft steps of a round."""

    def __init__(self, profile: StepProfile, shapes: RoundShapes) -> None:
        self._profile = profile
        self._shapes = shapes

    def plain(self, batch: Batch) -> StepShape:
        """The batch's decode rows, one a sequence."""
        return self._shapes.rows(_contexts([s for s in batch.sequences if s.is_decode_row]))

    def forward(self, batch: Batch, result: StepResult) -> list[Part]:
        """Of the verify forward: decode rows with their drafts, prefill chunks, observations."""
        outcomes = list(zip(batch.sequences, result.sequences, strict=True))
        chunks = [s for s, _ in outcomes if not s.is_decode_row]
        rows = [(s, outcome) for s, outcome in outcomes if s.is_decode_row]
        num_rows = np.array([1.0 + outcome.num_draft_tokens for _, outcome in rows])
        decode = self._shapes.rows(_contexts([s for s, _ in rows]), num_rows)
        parts = self._decode(self.plain(batch), decode) if rows else []
        products = float(sum(len(s.token_ids) * s.num_tokens for s in chunks))
        chunk = self._shapes.chunk(sum(len(s.token_ids) for s in chunks), products)
        prompts = [self._prompt_seconds(s) for s in chunks if s.sampling is not None]
        observed = [seconds for seconds in prompts if seconds > 0.0]
        added = self._profile.added_seconds(decode.num_rows, chunk) + sum(observed)
        parts.append((added, (COMPUTE, PREFILL)))
        num_looked = result.num_observed - len(observed)
        if num_looked > 0:
            parts.append((num_looked * self._look_seconds(rows), (COMPUTE,)))
        return parts

    def drafts(self, sequences: Sequence[ScheduledSequence]) -> tuple[str, list[Part]] | None:
        """The drafter's kind of step, and its draft steps with what begins them.

        None where nobody drafted, and where several did: the time says nothing of each.
        """
        drafting = [(s, s.draft) for s in sequences if s.draft is not None and s.draft_length > 0]
        names = {draft.drafter for _, draft in drafting}
        if len(names) != 1:
            return None
        drafter = names.pop()
        kind = draft_kind(drafter)
        if kind not in self._profile.model.costs:
            return None
        budgets = [float(draft.draft_budget) for _, draft in drafting]
        reads = np.array([self._shapes.draft_reads(drafter, budget) for budget in budgets])
        shape = self._shapes.rows(np.minimum(_contexts([s for s, _ in drafting]), reads))
        num_steps = max(s.draft_length for s, _ in drafting)
        read = num_steps * self._profile.read_seconds(kind, shape)
        whole = num_steps * self._profile.seconds(kind, shape)
        whole += self._profile.known_seconds(begin_kind(drafter), shape)
        return kind, [(whole - read, (COMPUTE, kind)), (read, (READ, kind))]

    def _decode(self, plain: StepShape, decode: StepShape) -> list[Part]:
        whole, read = (
            self._profile.seconds(VERIFY, plain),
            self._profile.read_seconds(VERIFY, plain),
        )
        extra = self._profile.seconds(VERIFY, decode) - whole
        return [(whole - read, (COMPUTE,)), (read, (READ,)), (extra, (COMPUTE, EXTRA_ROWS))]

    def _look_seconds(self, rows: Sequence[tuple[ScheduledSequence, SequenceResult]]) -> float:
        """What the observation of one row's attention takes, on the mean: which of them were is
        not said."""
        looks = [
            self._profile.known_seconds(
                observe_kind(s.draft.drafter),
                self._shapes.rows(_contexts([s]), 1 + outcome.num_draft_tokens),
            )
            for s, outcome in rows
            if s.draft is not None and s.draft_length > 0
        ]
        looking = [seconds for seconds in looks if seconds > 0.0]
        return sum(looking) / len(looking) if looking else 0.0

    def _prompt_seconds(self, sequence: ScheduledSequence) -> float:
        """What a prompt's last chunk does for its drafter's first view; 0: it does nothing."""
        if sequence.draft is None:
            return 0.0
        num_rows = min(OBSERVATION_WINDOW, len(sequence.token_ids))
        shape = self._shapes.rows(np.array([float(sequence.num_tokens)]), num_rows)
        return self._profile.known_seconds(prompt_kind(sequence.draft.drafter), shape)


def _contexts(sequences: Sequence[ScheduledSequence]) -> Floats:
    return np.array([float(s.num_computed_tokens) for s in sequences])
