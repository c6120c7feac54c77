"""Who waits, prefills and decodes in a simulated replica, and the KV tokens that they take.

As scheduler.py has it: a prompt is admitted with room for its expected answer and the rest of the
others'; when the pool is full, who is cheapest to compute again is preempted, never the oldest.
Tokens are counted instead of blocks, and a prefix in use counts in each of its requests.
"""

from bisect import insort
from collections import deque

from magicdec.config import OBSERVATION_WINDOW
from magicdec.routing.traffic import OutputEstimate
from magicdec.simulation.jobs import Job
from magicdec.simulation.prefix_store import PrefixStore


class Queues:
    """`prefilling` and `decoding` are by arrival at the router."""

    def __init__(self, total_kv_tokens: int, max_num_seqs: int) -> None:
        self._total_kv_tokens = total_kv_tokens
        self._max_num_seqs = max_num_seqs
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.decoding: list[Job] = []
        self.num_waiting_tokens = 0
        self.num_prefill_tokens = 0  # left to those that prefill
        self.num_preemptions = 0
        self._num_used = 0  # contexts of those that run
        self._prefixes = PrefixStore()
        self._answers = OutputEstimate()

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_free(self) -> int:
        """KV tokens that nobody uses, what the prefix cache would give up among them."""
        return self._total_kv_tokens - self._num_used

    def enqueue(self, job: Job) -> None:
        self._count_waiting(job)
        self.waiting.append(job)

    def make_room(self) -> None:
        """A token for every decode row."""
        while len(self.decoding) > self.num_free and self.num_running > 1:
            running = sorted((*self.decoding, *self.prefilling), key=lambda job: job.number)
            self._preempt(min(reversed(running[1:]), key=lambda job: job.num_tokens_lost))

    def admit(self, num_rows: int) -> None:
        """Those that wait, oldest first, while prompts leave some of a step's `num_rows`. The
        oldest takes half of them at most, so short prompts start beside a long one."""
        while self._num_wanted(num_rows) < num_rows and self._has_room():
            job = self.waiting.popleft()
            self.num_waiting_tokens -= job.num_left
            self._num_used += job.num_left
            cached = self._prefixes.match(job.trace, job.num_left - OBSERVATION_WINDOW)
            if job.num_cached_tokens is None:
                job.num_cached_tokens = cached
            job.num_left -= cached
            self.num_prefill_tokens += job.num_left
            insort(self.prefilling, job, key=lambda each: each.number)
            self._prefixes.shrink_to(self.num_free)

    def prefill(self, job: Job, num_rows: int) -> bool:
        """Moves a prompt on; True where it is complete, and nowhere now."""
        job.num_left -= num_rows
        self.num_prefill_tokens -= num_rows
        if job.num_left > 0:
            return False
        self.prefilling.remove(job)
        self._prefixes.add(job.trace)
        return True

    def decode(self, job: Job) -> None:
        insort(self.decoding, job, key=lambda each: each.number)

    def grow(self, job: Job, num_tokens: int) -> None:
        """One that runs has emitted so many."""
        job.emitted += num_tokens
        self._num_used += num_tokens

    def finish(self, job: Job) -> None:
        """It has its answer, and is in no queue."""
        self._num_used -= job.num_context_tokens
        self._answers.learn(job.trace.max_tokens, job.trace.num_output_tokens)
        self._prefixes.leave_behind(job.trace)

    def shrink_prefixes(self) -> None:
        self._prefixes.shrink_to(self.num_free)

    def _num_wanted(self, num_rows: int) -> int:
        if not self.prefilling:
            return 0
        oldest = self.prefilling[0].num_left
        return self.num_prefill_tokens - oldest + min(oldest, num_rows // 2)

    def _has_room(self) -> bool:
        """For the oldest that waits, with its expected answer; alone it always fits."""
        if not self.waiting or self.num_running >= self._max_num_seqs:
            return False
        if not self.num_running:
            return True
        running = (*self.decoding, *self.prefilling)
        needed = self.waiting[0].num_context_tokens + self._rest(self.waiting[0])
        return needed + sum(map(self._rest, running)) <= self.num_free

    def _rest(self, job: Job) -> int:
        """Of its answer, as far as answers seen let expect."""
        return max(self._answers.expected(job.trace.max_tokens, job.emitted) - job.emitted, 1)

    def _preempt(self, job: Job) -> None:
        """Back to the head of the queue, to be computed again."""
        if job.num_left > 0:
            self.prefilling.remove(job)
            self.num_prefill_tokens -= job.num_left
        else:
            self.decoding.remove(job)
        self._num_used -= job.num_context_tokens
        self._count_waiting(job)
        self.waiting.appendleft(job)
        self.num_preemptions += 1

    def _count_waiting(self, job: Job) -> None:
        job.num_left = job.num_context_tokens
        self.num_waiting_tokens += job.num_left
