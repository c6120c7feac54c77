"""What one step runs and what it returns: the only words that scheduler and runner share.

`draft_length` is gamma in the MagicDec paper and num_speculative_tokens in vLLM; `draft_budget`
is the paper's K. *Accepted* tokens are drafts the target agreed with; the *recovered* token
replaces the first draft it did not agree with; the *bonus* token follows a draft accepted whole.
Every round that samples emits its accepted tokens and exactly one recovered or bonus token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magicdec.sequence import Sequence
from magicdec.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Plan:
    """The controller's choice for one step, for every request that asks for nothing else."""

    drafter: str
    draft_length: int
    draft_budget: float  # KV positions, or below 1 a share of each context
    draft_lengths: Mapping[str, int] = field(default_factory=dict)  # by request id, that differ
    max_prefill_rows: int | None = None  # None: all that the token budget leaves
    prompt_drafter: str | None = None  # whose view a prompt's last chunk seeds; None: drafter's
    explores: bool = False  # one round to learn by: what serves later ones alone is put off
    stands: bool = False  # the next round's is to be the same, while the requests are

    def draft_length_of(self, request_id: str) -> int:
        return self.draft_lengths.get(request_id, self.draft_length)


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """Who drafts for one sequence this round, how far, and over how many KV positions.

    A prefill chunk carries one too (length 0): its drafter may learn from the chunk's attention.
    """

    drafter: str
    draft_length: int
    draft_budget: int
    needs_history: bool
    may_refresh: bool = True  # whether a decode row's attention may choose its view again


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: a prefill chunk, or a decode row with room for its draft.

    block_table covers num_computed_tokens + len(token_ids) + draft_length positions. `sequence_id`
    names one stay in the running set: a sequence that was preempted returns under another. The
    arrays are not to be written to: while nothing changes, the next step has the same ones.
    """

    sequence_id: int
    token_ids: NDArray[np.int64]  # [num_new], to be computed at num_computed_tokens onwards
    num_computed_tokens: int
    block_table: NDArray[np.int64]  # [num_blocks]
    sampling: SamplingParams | None  # None: the chunk ends before the last token, nothing to sample
    num_prompt_tokens: int
    history: NDArray[np.int64] | None  # [num_tokens] prompt and output, for penalties and drafters
    draft: DraftChoice | None  # None: speculation is off for this request

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        token_ids: NDArray[np.int64],
        draft: DraftChoice | None,
    ) -> "ScheduledSequence":
        """The next rows of a sequence whose blocks are there; `token_ids` are theirs."""
        start = sequence.num_computed_tokens
        samples = start + len(token_ids) == len(sequence.token_ids)
        drafter_reads = draft is not None and draft.needs_history
        needs_history = drafter_reads or (samples and sequence.has_penalties)
        return cls(
            sequence.sequence_id,
            token_ids,
            start,
            sequence.table_array(),
            sequence.request.sampling if samples else None,
            sequence.num_prompt_tokens,
            sequence.history() if needs_history else None,
            draft,
        )

    @property
    def draft_length(self) -> int:
        """Above 0 only for decode rows. The drafter may propose fewer tokens."""
        return 0 if self.draft is None else self.draft.draft_length

    @property
    def is_decode_row(self) -> bool:
        """The sequence's last token, an output token: what a round verifies."""
        is_output = self.num_computed_tokens >= self.num_prompt_tokens
        return is_output and self.sampling is not None and len(self.token_ids) == 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence up to and including this step's, drafts not counted."""
        return self.num_computed_tokens + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Every rank gets the same one.

    Beside its KV pages a rank keeps, by sequence_id, what drafters have learnt of a sequence;
    `released` lists the ids that will not come again.
    """

    sequences: tuple[ScheduledSequence, ...]
    released: tuple[int, ...] = ()
    # Decode rows alone, and as far as is known the next step is theirs too: plain ones a token
    # further, for which their blocks have room, others with drafts over views of the same kind.
    goes_on: bool = False


class SequenceResult(NamedTuple):
    """`token_ids`: accepted then recovered/bonus; empty for a chunk that samples nothing.

    The whole draft is in it because ranks are compared: two that drafted differently verified
    different rows together.
    """

    token_ids: tuple[int, ...]
    draft_token_ids: tuple[int, ...] = ()

    @property
    def num_draft_tokens(self) -> int:
        return len(self.draft_token_ids)

    @property
    def num_accepted_tokens(self) -> int:
        return len(self.token_ids) - 1 if self.token_ids else 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One SequenceResult a scheduled sequence, in the batch's order; times in seconds."""

    sequences: tuple[SequenceResult, ...]
    draft_seconds: float
    verify_seconds: float
    num_observed: int = 0  # sequences whose attention was shown to a drafter, while verifying
