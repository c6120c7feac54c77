"""Who runs next, within token and block budgets.

There is no prefill phase and no decode phase: a sequence has num_computed_tokens catching up with
its tokens, one row behind while it decodes. Chunked prefill, resuming after preemption and decoding
are that one rule. A prefix that is in the cache already is a num_computed_tokens to start from.
"""

import itertools
from collections import deque
from dataclasses import replace

import numpy as np

from magicdec.batch import Batch, DraftChoice, Plan, ScheduledSequence, StepResult
from magicdec.block_pool import BlockPool
from magicdec.config import OBSERVATION_WINDOW, EngineConfig
from magicdec.draft_choice import choose_draft
from magicdec.prefix_cache import PrefixCache
from magicdec.types import Sequence, SequenceStatus


class Scheduler:
    """Owns the block pool and the queues; knows no model and no text."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int) -> None:
        self._config = config.scheduler
        self._speculation = config.speculation
        self._block_size = config.cache.block_size
        self._max_model_len = max_model_len
        self._scheduled: list[Sequence] = []
        self._released: list[int] = []  # ids of stays that ended since the last step
        self._sequence_ids = itertools.count()
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of sequences admitted for the first time
        self.num_cached_tokens = 0  # of these, found in the prefix cache
        self.pool = BlockPool(num_blocks)
        self._prefix_cache = PrefixCache(
            self.pool, config.cache.block_size, config.cache.prefix_caching
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self, plan: Plan) -> Batch:
        """Decode rows first, then prefill chunks with what is left of the token budget."""
        self._scheduled = []
        for sequence in self.running:
            self._prefix_cache.register(sequence)
        scheduled: list[ScheduledSequence] = []
        budget = self._config.max_batch_tokens
        decoding = [s for s in self.running if s.num_uncomputed_tokens == 1]
        # Drafts leave a part of the budget to prompts, or a full batch would keep newcomers out.
        pending = self.waiting or len(decoding) < len(self.running)
        reserve = max(budget // 4, OBSERVATION_WINDOW) if pending else 0
        for i, sequence in enumerate(decoding):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for an earlier one
            rows_left = budget - (len(decoding) - i - 1) - reserve
            draft = self._choose(plan, sequence)
            wanted = 0 if draft is None else min(draft.draft_length, rows_left - 1)
            draft_length = self._reserve_decode(sequence, wanted)
            if draft_length is None:
                continue
            draft = None if draft is None else replace(draft, draft_length=draft_length)
            scheduled.append(self._take(sequence, 1, draft))
            budget -= 1 + draft_length
        for sequence in [s for s in self.running if s.num_uncomputed_tokens > 1]:
            budget -= self._take_chunk(plan, sequence, budget, scheduled)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._take_chunk(plan, admitted, budget, scheduled)
        released, self._released = tuple(self._released), []
        return Batch(tuple(scheduled), released)

    def update(self, batch: Batch, result: StepResult) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Moves every scheduled sequence forward; returns it with the tokens the step emitted.

        The tokens are not appended: the engine does, up to a stop.
        """
        emitted = []
        for sequence, share, outcome in zip(
            self._scheduled, batch.sequences, result.sequences, strict=True
        ):
            # A draft's last accepted token is computed; the recovered or bonus token is not.
            sequence.num_computed_tokens += len(share.token_ids) + outcome.num_accepted_tokens
            if share.is_decode_row:
                if outcome.num_draft_tokens > 0 and share.draft is not None:
                    sequence.drafter = share.draft.drafter
                sequence.num_rounds += 1
                sequence.num_draft_tokens += outcome.num_draft_tokens
                sequence.num_accepted_tokens += outcome.num_accepted_tokens
            emitted.append((sequence, outcome.token_ids))
        self._scheduled = []
        return emitted

    def release_lookahead(self, sequence: Sequence) -> None:
        """Gives back the blocks that a draft reserved and its accepted tokens did not reach."""
        needed = self._num_blocks(len(sequence.token_ids))
        self.pool.free(sequence.block_table[needed:])
        del sequence.block_table[needed:]

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out of its queue and gives back its blocks at once."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is lost, wrongly shared or held by a sequence not
        running."""
        self.pool.check_integrity(s.block_table for s in self.running)
        self._prefix_cache.check_integrity(self.running)
        for sequence in self.running:
            held = len(sequence.block_table) * self._block_size
            assert held >= sequence.num_computed_tokens, "computed tokens without a block"
        for sequence in self.waiting:
            assert not sequence.block_table and sequence.num_computed_tokens == 0

    def _take_chunk(
        self, plan: Plan, sequence: Sequence, budget: int, scheduled: list[ScheduledSequence]
    ) -> int:
        """Adds the sequence's next prefill chunk, of at most `budget` rows; returns its length.

        The last chunk of a prompt holds its whole observation window: the boundary before it moves.
        """
        left = sequence.num_uncomputed_tokens
        chunk = left if left <= budget else min(budget, left - OBSERVATION_WINDOW)
        if chunk <= 0:
            return 0
        draft = self._choose(plan, sequence)
        draft = None if draft is None else replace(draft, draft_length=0)
        scheduled.append(self._take(sequence, chunk, draft))
        return chunk

    def _choose(self, plan: Plan, sequence: Sequence) -> DraftChoice | None:
        wish = sequence.request.speculation
        return choose_draft(plan, wish, self._speculation, len(sequence.token_ids))

    def _take(
        self, sequence: Sequence, num_rows: int, draft: DraftChoice | None
    ) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        stop = start + num_rows
        samples = stop == len(sequence.token_ids)
        sampling = sequence.request.sampling
        drafter_reads = draft is not None and draft.needs_history
        needs_history = drafter_reads or (samples and sampling.has_penalties)
        self._scheduled.append(sequence)
        return ScheduledSequence(
            sequence_id=sequence.sequence_id,
            token_ids=np.array(sequence.token_ids[start:stop], dtype=np.int64),
            num_computed_tokens=start,
            block_table=np.array(sequence.block_table, dtype=np.int64),
            sampling=sampling if samples else None,
            num_prompt_tokens=sequence.num_prompt_tokens,
            history=np.array(sequence.token_ids, dtype=np.int64) if needs_history else None,
            draft=draft,
        )

    def _reserve_decode(self, sequence: Sequence, draft_length: int) -> int | None:
        """Blocks for the next row and its draft; the draft shrinks before anyone is preempted.

        Returns the draft length there is room for, or None when the sequence itself was preempted.
        """
        num_tokens = len(sequence.token_ids)
        sampling = sequence.request.sampling
        # Tokens past the end of the request or of the context would be thrown away.
        useful = min(
            sampling.max_tokens - sequence.num_output_tokens, self._max_model_len - num_tokens
        )
        held = len(sequence.block_table) + self.pool.num_free
        room = held * self._block_size - num_tokens
        draft_length = max(min(draft_length, useful - 1, room), 0)
        needed = self._num_blocks(num_tokens + draft_length) - len(sequence.block_table)
        while needed > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        if needed > 0:
            last = sequence.block_table[-1]
            sequence.block_table += self.pool.allocate(needed, after=last)
        return draft_length

    def _admit(self) -> Sequence | None:
        """Moves the oldest waiting sequence to running, with blocks for all of its tokens: those
        that hold its prefix already, and new ones."""
        if not self.waiting or len(self.running) >= self._config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        cached = self._prefix_cache.match(sequence)
        needed = self._num_blocks(len(sequence.token_ids) + 1)
        # Cached blocks that others hold cost nothing; idle ones are among num_free.
        taken = needed - self.pool.num_referenced(cached)
        # Room for the others' next block keeps a newcomer from being preempted at once.
        if taken + len(self.running) > self.pool.num_free and self.running:
            return None
        self.waiting.popleft()
        self.pool.share(cached)
        after = cached[-1] if cached else None
        sequence.block_table = cached + self.pool.allocate(needed - len(cached), after)
        sequence.num_computed_tokens = len(cached) * self._block_size
        sequence.num_registered_blocks = len(cached)
        self._count_cached(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.sequence_id = next(self._sequence_ids)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what the cache loses is computed again when it returns."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._released.append(sequence.sequence_id)
        self._prefix_cache.release(sequence)

    def _count_cached(self, sequence: Sequence) -> None:
        """Only a first admission counts: what a preempted sequence finds is its own."""
        if sequence.num_cached_tokens is None:
            num_prompt = sequence.num_prompt_tokens
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, num_prompt)
            self.num_prompt_tokens += num_prompt
            self.num_cached_tokens += sequence.num_cached_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
