"""The engine: requests in, tokens and text out, one step at a time."""

import itertools
import time
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from magicdec.answer import Answer
from magicdec.batch import Batch, StepResult
from magicdec.config import ConfigError, EngineConfig
from magicdec.control.round_policy import FixedPolicy, RoundPolicy
from magicdec.detokenizer import TokenTexts
from magicdec.draft_choice import check_speculation
from magicdec.executor import Executor
from magicdec.model_loader import ModelFacts
from magicdec.round_tally import EngineCounts, RoundTally, StepCounts
from magicdec.scheduler import Scheduler
from magicdec.sequence import Sequence
from magicdec.stats import EngineLoad, EngineStats
from magicdec.types import (
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
)


class Engine:
    """Continuous batching over an executor. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: PreTrainedTokenizerBase,
        facts: ModelFacts,
        policy: RoundPolicy | None = None,
    ) -> None:
        """Without a policy every round is as the config says."""
        self.config = config
        self.stats = EngineStats()
        self._tally = RoundTally()
        self._executor = executor
        self._texts = TokenTexts(tokenizer)
        self._facts = facts
        self._total_kv_tokens = executor.num_blocks * config.cache.block_size
        self.max_model_len = _resolve_max_model_len(config, facts, self._total_kv_tokens)
        self._scheduler = Scheduler(config, executor.num_blocks, self.max_model_len)
        self.policy: RoundPolicy = policy or FixedPolicy.of(config.speculation)
        self._arrivals = itertools.count()
        self._answers: dict[str, Answer] = {}  # by request id
        self._finished_on_arrival: list[RequestOutput] = []

    def step(self) -> list[RequestOutput]:
        """One round of every running sequence. Raises ExecutorError when a rank fails."""
        started = time.perf_counter()
        outputs, self._finished_on_arrival = self._finished_on_arrival, []
        plan = self.policy.choose(self._scheduler.begin_step())
        batch = self._scheduler.schedule(plan)
        if batch.sequences:
            result = self._executor.execute(batch)
            outputs += self._update(batch, result)
            seconds = time.perf_counter() - started
            counts = self._tally.add(batch, result, plan, self.policy.forecast, seconds)
            self._record(counts, result)
            self.policy.observe(batch, result, seconds)
        return outputs

    def add(self, request: Request) -> None:
        """Queues a request; its journal counts as output. Raises RequestError if it cannot fit."""
        self._check(request)
        sequence = Sequence(request, next(self._arrivals), list(request.prompt_token_ids))
        answer = Answer(sequence, self._texts, self._facts.eos_token_ids, self.max_model_len)
        self._answers[request.request_id] = answer
        self._scheduler.add(sequence)
        reason = None
        for token_id in request.emitted_token_ids:
            _, _, reason = answer.append((token_id,))
        if reason is not None:  # the replica died between the last token and its finish reason
            self._finished_on_arrival.append(self._finish(sequence, (), "", reason))

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its blocks now; unknown ids are ignored (it just finished)."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._scheduler.drop(answer.sequence)

    def has_unfinished(self) -> bool:
        return bool(self._answers) or bool(self._finished_on_arrival)

    def load(self) -> EngineLoad:
        return EngineLoad(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            free_kv_tokens=self._scheduler.pool.num_free * self.config.cache.block_size,
            total_kv_tokens=self._total_kv_tokens,
            num_prefill_tokens=self._scheduler.num_prefill_tokens,
            num_waiting_tokens=sum(len(s.token_ids) for s in self._scheduler.waiting),
        )

    def take_counts(self) -> EngineCounts:
        """For who watches: its tally begins anew."""
        tally, self._tally = self._tally, RoundTally()
        return EngineCounts(
            load=self.load(),
            blocks=self._scheduler.pool.usage(),
            stats=replace(self.stats),
            tally=tally,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is lost or shared; meant for idle time and tests."""
        self._scheduler.check_integrity()
        tracked = {id(answer.sequence) for answer in self._answers.values()}
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        assert {id(s) for s in queued} == tracked, "a sequence is queued but not tracked"

    @property
    def attention_backend(self) -> str:
        return self._executor.attention_backend

    def shutdown(self) -> None:
        self._executor.shutdown()

    def _check(self, request: Request) -> None:
        num_prompt, limit = len(request.prompt_token_ids), self.max_model_len
        if request.request_id in self._answers:
            raise RequestError(f"request {request.request_id} is live already", param="request_id")
        if num_prompt == 0:
            raise RequestError("prompt must hold at least one token", param="prompt")
        if num_prompt >= limit:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; this model's context is {limit} tokens, "
                "of which at least one is for the answer",
                param="prompt",
                code="context_length_exceeded",
            )
        check_speculation(request.speculation, self.config.speculation)
        vocab_size = self._facts.vocab_size
        sampling = request.sampling
        for param, ids in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            bad = next((i for i in ids if not 0 <= i < vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{param}: token id {bad} is outside the vocabulary of {vocab_size}",
                    param=param,
                )

    def _update(self, batch: Batch, result: StepResult) -> list[RequestOutput]:
        outputs = []
        for sequence, emitted in self._scheduler.update(batch, result):
            if not emitted:
                continue
            request_id = sequence.request.request_id
            num_kept, text, reason = self._answers[request_id].append(emitted)
            if reason is not None:
                outputs.append(self._finish(sequence, emitted[:num_kept], text, reason))
            else:
                self._scheduler.release_lookahead(sequence)
                outputs.append(RequestOutput(request_id, emitted, text, sequence.usage()))
        return outputs

    def _finish(
        self, sequence: Sequence, kept: tuple[int, ...], text: str, reason: FinishReason
    ) -> RequestOutput:
        request_id = sequence.request.request_id
        self._scheduler.finish(sequence)
        text += self._answers.pop(request_id).flush()
        return RequestOutput(request_id, kept, text, sequence.usage(), reason)

    def _record(self, counts: StepCounts, result: StepResult) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_rounds += counts.num_decode_rows > 0
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.num_prompt_tokens = self._scheduler.num_prompt_tokens
        stats.num_cached_tokens = self._scheduler.num_cached_tokens
        stats.draft_seconds += result.draft_seconds
        stats.verify_seconds += result.verify_seconds
        stats.num_decode_rows += counts.num_decode_rows
        stats.num_draft_tokens += counts.num_draft_tokens
        stats.num_accepted_tokens += counts.num_accepted_tokens
        stats.num_prefill_tokens += counts.num_prefill_tokens


def _resolve_max_model_len(config: EngineConfig, facts: ModelFacts, pool_tokens: int) -> int:
    """The longest sequence that the model and the pool allow. Raises ConfigError when a setting
    asks for more."""
    wanted = config.model.max_model_len
    if wanted is not None and wanted > facts.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be at most the model's {facts.max_position_embeddings}, "
            f"got {wanted}"
        )
    if wanted is not None and wanted > pool_tokens:
        raise ConfigError(
            f"max_model_len must fit the KV pool of {pool_tokens} tokens, got {wanted}; "
            "raise kv_cache_bytes, or memory_share on a GPU"
        )
    return min(wanted or facts.max_position_embeddings, pool_tokens)
