"""A scheduler driven to the end without a model: a rank whose K/V are numbers."""

from collections import Counter
from collections.abc import Iterable
from random import Random

from magicdec.batch import Batch, Plan, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import OBSERVATION_WINDOW, EngineConfig
from magicdec.scheduler import Scheduler
from magicdec.sequence import Sequence
from magicdec.types import Request

NUM_IDS = 5  # few, so that drafts and prompts often agree
_MASK = 2**61 - 1


class SimulatedRank:
    """K/V of a position is a hash of its token and of all K/V before it, read from the pages; the
    next token is their sum. One wrong slot changes everything behind it.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, random: Random) -> None:
        self._block_size = config.cache.block_size
        self._random = random
        self.pages = [0] * (num_blocks * self._block_size)

    def execute(self, batch: Batch) -> StepResult:
        return StepResult(tuple(self._share(s) for s in batch.sequences), 0.0, 0.0)

    def _share(self, share: ScheduledSequence) -> SequenceResult:
        size, table = self._block_size, share.block_table
        context = share.num_computed_tokens
        total = sum(self.pages[table[p // size] * size + p % size] for p in range(context))
        position = context
        queue = [int(token) for token in share.token_ids]
        emitted: list[int] = []
        stands = True
        for row in range(len(queue) + share.draft_length):
            if row >= len(queue):  # a draft: often the target's own choice
                chosen = total % NUM_IDS
                token = chosen if self._random.random() < 0.7 else self._random.randrange(NUM_IDS)
                stands = stands and token == chosen
                if stands:
                    emitted.append(token)
            else:
                token = queue[row]
            kv = hash((token, total)) & _MASK
            self.pages[table[position // size] * size + position % size] = kv
            total, position = total + kv, position + 1
            if stands:
                accepted_total = total
        if share.sampling is None:
            return SequenceResult(())
        return SequenceResult((*emitted, accepted_total % NUM_IDS), (0,) * share.draft_length)


def plain_answer(request: Request) -> list[int]:
    """What the simulated model answers to a request alone, without pages."""
    total, answer = 0, list(request.emitted_token_ids)
    for token in (*request.prompt_token_ids, *answer):
        total += hash((token, total)) & _MASK
    while len(answer) < request.sampling.max_tokens:
        answer.append(total % NUM_IDS)
        if answer[-1] in request.sampling.stop_token_ids:
            break
        total += hash((answer[-1], total)) & _MASK
    return answer


class Simulation:
    """Engine.step without text. Every step is checked: budgets, windows, writes, blocks."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int, seed: int):
        speculation = config.speculation
        self._config = config
        self._plan = Plan("streaming", speculation.draft_length, speculation.draft_budget)
        self._rank = SimulatedRank(config, num_blocks, Random(seed))
        self.scheduler = Scheduler(config, num_blocks, max_model_len)
        self.sequences: list[Sequence] = []
        self.num_prefill_rows = 0

    def add(self, request: Request) -> Sequence:
        tokens = [*request.prompt_token_ids, *request.emitted_token_ids]
        sequence = Sequence(request, len(self.sequences), tokens)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def run(self, requests: Iterable[Request] = (), max_steps: int = 5000) -> list[list[int]]:
        """Steps until idle; returns every sequence's output so far."""
        for request in requests:
            self.add(request)
        for _ in range(max_steps):
            if not self.scheduler.running and not self.scheduler.waiting:
                return [s.token_ids[s.num_prompt_tokens :] for s in self.sequences]
            self.step()
        raise AssertionError("somebody starves")

    def step(self) -> None:
        load = self.scheduler.begin_step()
        batch = self.scheduler.schedule(self._plan)
        decoding = tuple(s.num_tokens for s in batch.sequences if s.is_decode_row)
        assert load.context_lens == decoding, "another load than was announced"
        self._check(batch)
        result = self._rank.execute(batch)
        for sequence, emitted in self.scheduler.update(batch, result):
            sampling = sequence.request.sampling
            for token in emitted:
                sequence.token_ids.append(token)
                long = sequence.num_output_tokens >= sampling.max_tokens
                if long or token in sampling.stop_token_ids:
                    self.scheduler.finish(sequence)
                    break
            else:
                if emitted:
                    self.scheduler.release_lookahead(sequence)
        self.scheduler.check_integrity()

    def _check(self, batch: Batch) -> None:
        scheduler, size = self.scheduler, self._config.cache.block_size
        scheduler.check_integrity()
        rows = sum(len(s.token_ids) + s.draft_length for s in batch.sequences)
        assert rows <= self._config.scheduler.max_batch_tokens
        ids = [s.sequence_id for s in batch.sequences]
        assert len(set(ids)) == len(ids), "scheduled twice"
        if scheduler.running:
            assert scheduler.running[0].sequence_id in ids, "the oldest one waits"
        held = Counter(block for s in scheduler.running for block in s.block_table)
        for share in batch.sequences:
            stop = share.num_tokens + share.draft_length
            for i in range(share.num_computed_tokens // size, -(-stop // size)):
                assert held[share.block_table[i]] == 1, "a shared block would be written"
            if share.is_decode_row:
                continue
            self.num_prefill_rows += len(share.token_ids)
            if share.sampling is not None:
                assert len(share.token_ids) >= min(OBSERVATION_WINDOW, share.num_tokens)
