"""An engine from its settings. Imports torch: processes that run no engine must not import this."""

import os
from dataclasses import dataclass, replace

import ray
from transformers import PreTrainedTokenizerBase

from magicdec.config import EngineConfig, ParallelConfig, SpeculativeConfig
from magicdec.deployments.adaptive_policy import build_policy
from magicdec.deployments.embedded_model import resolve_model
from magicdec.engine import Engine
from magicdec.executor import Executor, LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what people and the ingress need to know of it."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Loads the model: seconds to minutes. It and the draft model may name the embedded model."""
    path = resolve_model(config.model.path)
    resolved = replace(
        config,
        model=replace(config.model, path=path),
        speculation=_with_draft_model(config.speculation),
        parallel=_with_threads(config.parallel),
    )
    facts = read_model_facts(path)
    tokenizer = load_tokenizer(path)
    executor = _build_executor(resolved)
    engine = Engine(resolved, executor, tokenizer, facts)
    adaptive = resolved.speculation.adaptive
    if adaptive is not None:
        engine.policy = build_policy(resolved, adaptive, executor, engine.max_model_len)
    return BuiltEngine(engine, tokenizer, facts.vocab_size)


def _build_executor(config: EngineConfig) -> Executor:
    """One rank in this process, or one actor a rank in this process's placement group."""
    if config.parallel.tensor_parallel_size == 1:
        return LocalExecutor(config)
    from magicdec.cluster.executor import ShardedExecutor  # DeepSpeed: only where it is needed

    return ShardedExecutor(config, ray.util.get_current_placement_group())


def _with_draft_model(speculation: SpeculativeConfig) -> SpeculativeConfig:
    if speculation.draft_model is None:
        return speculation
    path = resolve_model(speculation.draft_model.path)
    return replace(speculation, draft_model=replace(speculation.draft_model, path=path))


def _with_threads(parallel: ParallelConfig) -> ParallelConfig:
    """Shares this machine's cores among the ranks: in a Ray actor torch would choose one thread."""
    if parallel.num_threads is not None:
        return parallel
    cores = len(os.sched_getaffinity(0))
    return replace(parallel, num_threads=max(1, cores // parallel.tensor_parallel_size))
