"""Batches built by hand, to be timed.

Block tables point at free pages, whose contents do not matter for time: a context of any length
needs no prefill.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.batch import Batch, DraftChoice, ScheduledSequence
from magicdec.config import EngineConfig
from magicdec.draft_choice import TRAITS
from magicdec.types import SamplingParams

MAX_ADVANCE = 32  # positions by which the rounds of one measurement may move on
_PERIOD = 16  # of the tokens: `ngram` finds all that it is asked for in a text that repeats


@dataclass(frozen=True, slots=True)
class Probe:
    """One batch of sequences alike: decode rows where num_rows is 1, chunks of prompts above."""

    batch_size: int
    context_len: int  # computed before the step
    num_rows: int = 1
    ends_prompt: bool = False
    drafter: str | None = None
    draft_length: int = 0
    draft_budget: int = 0

    @property
    def rows(self) -> int:
        """Of one sequence in the verify forward, where all is drafted that is asked for."""
        return self.num_rows + self.draft_length

    @property
    def end(self) -> int:
        """Positions up to the last row of a chunk; a decode row's are its context."""
        return self.context_len + (self.num_rows if self.num_rows > 1 else 0)

    @property
    def num_positions(self) -> int:
        """That one sequence's block table covers."""
        return self.context_len + self.rows + MAX_ADVANCE


class ProbePool:
    """What one executor takes: the limits of scheduler, model and KV pool, which is all free."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self._max_model_len = max_model_len

    def fits(self, probe: Probe) -> bool:
        """Whether the engine itself might run such a batch."""
        scheduler = self.config.scheduler
        return (
            probe.context_len >= 1
            and probe.batch_size <= scheduler.max_num_seqs
            and probe.batch_size * probe.rows <= scheduler.max_batch_tokens
            and probe.draft_length <= self.config.speculation.max_draft_length
            and probe.num_positions <= self._max_model_len
            and probe.batch_size * self._blocks_of(probe) <= self.num_blocks
        )

    def longest_context(self, batch_size: int, num_rows: int) -> int:
        """That `fits` allows; below 1 where none fits."""
        pool = self.num_blocks // batch_size * self.config.cache.block_size
        return min(pool, self._max_model_len) - num_rows - MAX_ADVANCE

    def batch(
        self,
        probe: Probe,
        sequence_ids: Sequence[int],  # [batch_size]
        sampling: SamplingParams,
        advance: int = 0,
        released: tuple[int, ...] = (),
    ) -> Batch:
        """The probe's step, `advance` positions further on; no page is in two tables.

        Raises ValueError for a batch that does not fit, or an advance beyond MAX_ADVANCE.
        """
        if not self.fits(probe) or not 0 <= advance <= MAX_ADVANCE:
            raise ValueError(f"{probe} does not fit, {advance} positions on")
        size = self._blocks_of(probe)
        start = probe.context_len + advance
        shares = tuple(
            _sequence(probe, sequence_id, np.arange(i * size, (i + 1) * size), start, sampling)
            for i, sequence_id in enumerate(sequence_ids)
        )
        return Batch(shares, released)

    def _blocks_of(self, probe: Probe) -> int:
        return -(-probe.num_positions // self.config.cache.block_size)


def _sequence(
    probe: Probe,
    sequence_id: int,
    block_table: NDArray[np.int64],
    start: int,
    sampling: SamplingParams,
) -> ScheduledSequence:
    stop = start + probe.num_rows
    tokens = np.arange(stop, dtype=np.int64) % _PERIOD
    decodes = probe.num_rows == 1
    draft = None
    if probe.drafter is not None:
        needs_history = TRAITS[probe.drafter].needs_history
        draft = DraftChoice(probe.drafter, probe.draft_length, probe.draft_budget, needs_history)
    return ScheduledSequence(
        sequence_id=sequence_id,
        token_ids=tokens[start:],
        num_computed_tokens=start,
        block_table=block_table,
        sampling=sampling if decodes or probe.ends_prompt else None,
        num_prompt_tokens=start if decodes else stop if probe.ends_prompt else stop + 1,
        history=tokens if draft is not None and draft.needs_history else None,
        draft=draft,
    )
