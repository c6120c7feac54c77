"""Who runs next, within token and block budgets.

There is no prefill phase and no decode phase: a sequence has num_computed_tokens catching up with
its tokens, one row behind while it decodes. Chunked prefill, resuming after preemption and decoding
are that one rule. A prefix that is in the cache already is a num_computed_tokens to start from.
"""

import itertools
from collections import deque
from dataclasses import replace

import numpy as np

from magicdec.batch import Batch, Plan, ScheduledSequence, StepResult
from magicdec.block_pool import BlockPool
from magicdec.config import OBSERVATION_WINDOW, EngineConfig
from magicdec.control.round_costs import RoundLoad
from magicdec.draft_choice import DraftChoices
from magicdec.kv_reservation import KvReservation
from magicdec.preemption import cheapest_victim
from magicdec.prefill_shares import prefill_chunks, rows_wanted
from magicdec.prefix_cache import PrefixCache
from magicdec.sequence import Sequence, SequenceStatus


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
        self._reservation = KvReservation(config.cache.block_size, max_model_len)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of sequences admitted for the first time
        self.num_cached_tokens = 0  # of these, found in the prefix cache
        self.pool = BlockPool(num_blocks)
        self._prefix_cache = PrefixCache(
            self.pool, config.cache.block_size, config.cache.prefix_caching
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self._decoding: list[Sequence] = []  # of these, as begin_step found them
        self._prefilling: list[Sequence] = []  # the others

    @property
    def num_prefill_tokens(self) -> int:
        """Still to compute before a first token, of waiting and running sequences."""
        running = (s.num_uncomputed_tokens for s in self.running)
        waiting = sum(len(s.token_ids) for s in self.waiting)
        return waiting + sum(n for n in running if n > 1)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def begin_step(self) -> RoundLoad:
        """Gives every decode row its next token's block, admits whom there is room for, and says
        what the step has to do. Follow it with `schedule`."""
        for sequence in self.running:
            self._prefix_cache.register(sequence)
        self._sort_running()
        self._make_room()
        num_rows = self._config.max_batch_tokens - len(self._decoding)
        while self.waiting and rows_wanted(self._prefilling, num_rows) < num_rows:
            if not self._admit():
                break
        chunks = prefill_chunks(self._prefilling, num_rows)
        decoding, most = self._decoding, self._max_model_len
        return RoundLoad(
            context_lens=tuple([len(s.token_ids) for s in decoding]),
            num_prefill_rows=sum(rows for _, rows in chunks),
            prefill_products=float(sum(n * (s.num_computed_tokens + n) for s, n in chunks)),
            request_keys=tuple([s.request.request_id for s in decoding]),
            draft_limits=tuple([s.draft_limit(most) for s in decoding]),
        )

    def schedule(self, plan: Plan) -> Batch:
        """The decode rows that begin_step named, in that order, then prefill chunks with what is
        left of the token budget."""
        decoding, budget = self._decoding, self._config.max_batch_tokens
        choices = DraftChoices(plan, self._speculation)
        # Drafts leave a part of the budget to prompts, or a full batch would keep newcomers out.
        reserve = max(budget // 4, OBSERVATION_WINDOW) if self._prefilling else 0
        last_ids = np.array([s.token_ids[-1] for s in decoding], dtype=np.int64)
        scheduled: list[ScheduledSequence] = []
        goes_on = plan.stands and not self._prefilling and bool(decoding)
        for i, sequence in enumerate(decoding):
            draft = choices.choose(sequence.request, len(sequence.token_ids))
            if draft is not None and draft.draft_length > 0:
                rows_left = budget - (len(decoding) - i - 1) - reserve
                wanted = min(draft.draft_length, rows_left - 1)
                draft = choices.with_length(draft, self._reserve_lookahead(sequence, wanted))
                budget -= draft.draft_length
                goes_on = goes_on and choices.goes_on(draft, sequence, self._max_model_len)
            budget, goes_on = budget - 1, goes_on and self._reserve_lookahead(sequence, 1) == 1
            scheduled.append(ScheduledSequence.of(sequence, last_ids[i : i + 1], draft))
        self._scheduled = decoding.copy()
        if self._prefilling:
            scheduled += self._schedule_chunks(plan, budget)
        released, self._released = tuple(self._released), []
        return Batch(tuple(scheduled), released, goes_on)

    def _schedule_chunks(self, plan: Plan, budget: int) -> list[ScheduledSequence]:
        most = budget if plan.max_prefill_rows is None else min(budget, plan.max_prefill_rows)
        prompt_plan = replace(plan, drafter=plan.prompt_drafter or plan.drafter)
        choices = DraftChoices(prompt_plan, self._speculation)
        scheduled = []
        for sequence, num_rows in prefill_chunks(self._prefilling, most):
            draft = choices.choose(sequence.request, len(sequence.token_ids))
            draft = None if draft is None else choices.with_length(draft, 0)
            rows = sequence.next_token_ids(num_rows)
            scheduled.append(ScheduledSequence.of(sequence, rows, draft))
            self._scheduled.append(sequence)
        return scheduled

    def update(self, batch: Batch, result: StepResult) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Moves every scheduled sequence forward; returns it with the tokens the step emitted.

        The tokens are not appended: the engine does, up to a stop.
        """
        emitted = []
        for sequence, share, outcome in zip(
            self._scheduled, batch.sequences, result.sequences, strict=True
        ):
            # A draft's last accepted token is computed; the recovered or bonus token is not.
            num_accepted = outcome.num_accepted_tokens
            sequence.num_computed_tokens += len(share.token_ids) + num_accepted
            if share.is_decode_row:
                sequence.num_rounds += 1
                sequence.num_draft_tokens += outcome.num_draft_tokens
                sequence.num_accepted_tokens += num_accepted
                if outcome.num_draft_tokens > 0 and share.draft is not None:
                    sequence.drafter = share.draft.drafter
            emitted.append((sequence, outcome.token_ids))
        self._scheduled = []
        return emitted

    def release_lookahead(self, sequence: Sequence) -> None:
        """Gives back the blocks that a draft reserved and its accepted tokens did not reach."""
        needed = self._num_blocks(len(sequence.token_ids))
        if needed < len(sequence.block_table):
            self.pool.free(sequence.cut_blocks(needed))

    def finish(self, sequence: Sequence) -> None:
        """It has its answer, from whose length admission learns."""
        self._reservation.learn(sequence)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out of its queue and gives back its blocks at once."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def check_integrity(self) -> None:
        """Raises AssertionError: a block is lost, wrongly shared, or held by who does not run."""
        self.pool.check_integrity(s.block_table for s in self.running)
        self._prefix_cache.check_integrity(self.running)
        for sequence in self.running:
            held = len(sequence.block_table) * self._block_size
            assert held >= sequence.num_computed_tokens, "computed tokens without a block"
        for sequence in self.waiting:
            assert not sequence.block_table and sequence.num_computed_tokens == 0

    def _sort_running(self) -> None:
        self._decoding = [s for s in self.running if s.decodes]
        self._prefilling = []
        if len(self._decoding) < len(self.running):
            self._prefilling = [s for s in self.running if not s.decodes]

    def _make_room(self) -> None:
        """A block for the next token of every decode row. Drafts come later and take what is free:
        nobody is preempted who would not be without them."""
        while len(short := self._short_of_a_block()) > self.pool.num_free:
            self._preempt(cheapest_victim(self.running, self.pool, self._block_size))
            self._sort_running()
        for sequence in short:
            self._extend(sequence, len(sequence.token_ids))

    def _short_of_a_block(self) -> list[Sequence]:
        """Of one: all but the last of a round's tokens had their blocks before."""
        size = self._block_size
        return [s for s in self._decoding if len(s.token_ids) > size * len(s.block_table)]

    def _reserve_lookahead(self, sequence: Sequence, draft_length: int) -> int:
        """Blocks for a draft, which shrinks to what is free. Returns its length."""
        num_tokens, held = len(sequence.token_ids), len(sequence.block_table)
        length = max(min(draft_length, sequence.useful_draft_length(self._max_model_len)), 0)
        if num_tokens + length > held * self._block_size:
            room = (held + self.pool.num_free) * self._block_size - num_tokens
            length = min(length, room)
            self._extend(sequence, num_tokens + length)
        return length

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        needed = self._num_blocks(num_tokens) - len(sequence.block_table)
        if needed > 0:
            sequence.add_blocks(self.pool.allocate(needed, after=sequence.block_table[-1]))

    def _admit(self) -> bool:
        """Moves the oldest waiting sequence to running, with blocks for all of its tokens: those
        that hold its prefix already, and new ones.

        Its expected answer has room beside the rest of the others': a newcomer that makes somebody
        be preempted costs more than it gains. Alone it always fits.
        """
        if len(self.running) >= self._config.max_num_seqs:
            return False
        sequence = self.waiting[0]
        cached = self._prefix_cache.match(sequence)
        needed = self._num_blocks(len(sequence.token_ids) + 1)
        # Cached blocks that others hold cost nothing; idle ones are among num_free.
        taken = self._reservation.num_blocks(sequence) - self.pool.num_referenced(cached)
        growth = self._reservation.num_growing(self.running)
        if taken + growth > self.pool.num_free and self.running:
            return False
        self.waiting.popleft()
        self.pool.share(cached)
        after = cached[-1] if cached else None
        sequence.hold_blocks(cached + self.pool.allocate(needed - len(cached), after))
        sequence.num_computed_tokens = len(cached) * self._block_size
        sequence.num_registered_blocks = len(cached)
        self._count_cached(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.sequence_id = next(self._sequence_ids)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        self._sort_running()
        return True

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
