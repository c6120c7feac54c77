"""What a bench is asked, whether this engine can do it, and what the plan says of the same."""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from magicdec.batch import Plan as RoundPlan
from magicdec.config import (
    OBSERVATION_WINDOW,
    CacheConfig,
    ConfigError,
    EngineConfig,
    check_at_least,
    check_at_most,
)
from magicdec.deployments.bench_text import neighbouring_windows, read_text
from magicdec.deployments.engine_settings import GIB
from magicdec.deployments.live_bench import answer_tokens
from magicdec.deployments.plan_inputs import read_model
from magicdec.draft_choice import DraftChoices
from magicdec.planning.devices import PlanDevice
from magicdec.planning.figures import PointFigures
from magicdec.planning.memory import PlanModel
from magicdec.planning.plan import Plan, PlanRequest, draft_settings
from magicdec.planning.rounds import DraftSetting
from magicdec.types import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Every batch at every context. Raises ConfigError and RequestError naming field and limit."""

    batch_sizes: tuple[int, ...]
    context_lens: tuple[int, ...]
    seconds: float = 3.0  # of plain decoding at a point, about; with drafts as many rounds
    segment_rounds: tuple[int, int] = (4, 24)  # of each side, at least and at most
    temperature: float = 0.8

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batch_sizes), ("context", self.context_lens)):
            for value in values:
                check_at_least(name, value, 1)
        if not 0.0 < self.seconds < math.inf:
            raise ConfigError(f"seconds must be above 0 and finite, got {self.seconds}")
        low, high = self.segment_rounds
        check_at_least("rounds", low, 1)
        if high < low:
            raise ConfigError(f"rounds must be LOW:HIGH with LOW at most HIGH, got {low}:{high}")
        SamplingParams(temperature=self.temperature)

    @property
    def points(self) -> list[tuple[int, int]]:
        """Batch and context, batch by batch."""
        return list(product(self.batch_sizes, self.context_lens))

    @property
    def answer_tokens(self) -> int:
        """The most that a sequence may add to its context."""
        return answer_tokens(self.segment_rounds[1], num_policies=2)


def bench_config(config: EngineConfig, request: BenchRequest) -> EngineConfig:
    """The engine as it is served, with as many sequences at once as the bench needs, and with the
    prefix cache that its prompts stay in. Raises ConfigError for what cannot be measured."""
    num_ranks, speculation = config.parallel.tensor_parallel_size, config.speculation
    if num_ranks > 1:
        raise ConfigError(
            "tensor_parallel_size must be 1 (the bench's engine runs in this process), "
            f"got {num_ranks}"
        )
    if speculation.adaptive is None:
        raise ConfigError(
            "draft_length must be empty (the bench measures what the rounds choose), "
            f"got {speculation.draft_length}"
        )
    num_seqs = max(config.scheduler.max_num_seqs, *request.batch_sizes)
    num_rows = max(config.scheduler.max_batch_tokens, num_seqs + OBSERVATION_WINDOW)
    scheduler = replace(config.scheduler, max_num_seqs=num_seqs, max_batch_tokens=num_rows)
    return replace(config, scheduler=scheduler, cache=replace(config.cache, prefix_caching=True))


def check_context(request: BenchRequest, config: EngineConfig, model: PlanModel) -> None:
    """Raises ConfigError where the model's context does not hold the longest and its answer."""
    limits = [
        (limit, name)
        for limit, name in (
            (config.model.max_model_len, "max_model_len"),
            (model.max_context, "the model's max_position_embeddings"),
        )
        if limit is not None
    ]
    if limits:
        limit, name = min(limits)
        what = f"context ({name} {limit} less {request.answer_tokens} for an answer)"
        check_at_most(what, max(request.context_lens), limit - request.answer_tokens)


def pool_tokens(config: EngineConfig, model: PlanModel) -> int | None:
    """What the KV pool will hold, a draft model's memory left in it. None: a GPU's engine finds it
    out when it has loaded."""
    cache, token_bytes = config.cache, model.geometry.kv_bytes_per_token
    if cache.num_blocks is not None:
        return cache.num_blocks * cache.block_size
    pool = _pool_bytes(cache)
    return (
        None if pool is None else int(pool // (token_bytes * cache.block_size)) * cache.block_size
    )


def _pool_bytes(cache: CacheConfig) -> int | None:
    sized_by_gpu = cache.kv_cache_bytes is None and torch.cuda.is_available()
    return None if sized_by_gpu else cache.pool_bytes


def check_pool(
    request: BenchRequest, config: EngineConfig, model: PlanModel, num_tokens: int
) -> None:
    """Raises ConfigError, saying what would fit, where a pool of so many tokens does not hold the
    largest batch at the longest context."""
    block_size, answer = config.cache.block_size, request.answer_tokens
    batch, context = max(request.batch_sizes), max(request.context_lens)
    held = -(-(context + answer) // block_size) * block_size  # by one sequence
    if batch * held <= num_tokens:
        return
    ways = []
    if num_tokens >= held:
        ways.append(f"batches up to {num_tokens // held} at context {context:,}")
    longest = num_tokens // block_size // batch * block_size - answer
    if longest > 0:
        ways.append(f"contexts up to {longest:,} at batch {batch}")
    missing = batch * held - num_tokens
    if config.cache.num_blocks is not None:
        ways.append(f"num_blocks {config.cache.num_blocks + missing // block_size:,}")
    elif (pool := _pool_bytes(config.cache)) is not None:
        # A whole block more, so that rounding a block down does not matter.
        more = (missing + block_size) * model.geometry.kv_bytes_per_token
        gib = math.ceil(100 * (pool + more) / GIB) / 100
        ways.append(f"kv_cache_gib {gib:,.2f}")
    raise ConfigError(
        f"batch {batch} at context {context:,}: with {answer} tokens for an answer its KV takes "
        f"{batch * held:,} tokens, and the pool holds {num_tokens:,}; what would fit: "
        + "; ".join(ways)
    )


def read_prompts(
    request: BenchRequest, tokenizer: PreTrainedTokenizerBase, text: Path | None
) -> list[list[int]]:
    """The largest batch at the longest context. Raises ConfigError for a text that cannot be read
    or is too short."""
    try:
        ids = list(tokenizer(read_text(text), verbose=False)["input_ids"])
    except OSError as error:
        raise ConfigError(f"text: cannot read {text}: {error.strerror}") from error
    batch, context = max(request.batch_sizes), max(request.context_lens)
    try:
        return neighbouring_windows(ids, batch, context)
    except ConfigError as error:
        raise ConfigError(
            f"text: batch {batch} at context {context:,}: {error}; give a longer file"
        ) from error


def planned_points(
    request: BenchRequest, config: EngineConfig, model: PlanModel, device: PlanDevice
) -> dict[tuple[int, int], PointFigures]:
    """By batch and context, with the drafters and budgets among which the rounds choose."""
    draft = config.speculation.draft_model
    draft_shape = None
    if draft is not None:
        draft_shape = read_model(draft.path, config.model.dtype, on_this_machine=True)
    found: dict[tuple[int, int], PointFigures] = {}
    for context_len in request.context_lens:
        plan = Plan(
            PlanRequest(
                model=model,
                device=device,
                batch_sizes=request.batch_sizes,
                context_lens=(context_len,),
                settings=_draft_settings(config, context_len),
                max_draft_length=config.speculation.max_draft_length,
                draft_model=draft_shape,
                limits=config.speculation,
            )
        )
        found |= {(point.batch_size, context_len): point for point in plan.points()}
    return found


def _draft_settings(config: EngineConfig, context_len: int) -> tuple[DraftSetting, ...]:
    """Budgets in positions, a share of the context as the engine would take it."""
    speculation = config.speculation
    adaptive = speculation.adaptive
    if adaptive is None:
        return ()
    asking = Request("plan", (0,), SamplingParams())
    budgets: list[int] = []
    for budget in adaptive.draft_budgets:
        wish = RoundPlan(speculation.drafter, speculation.max_draft_length, budget)
        choice = DraftChoices(wish, speculation).choose(asking, context_len)
        if choice is not None and choice.draft_budget not in budgets:
            budgets.append(choice.draft_budget)
    return draft_settings(adaptive.drafters, budgets, ())  # accepted as is expected by default
