"""A real model end to end: plain and drafted rounds of the engine in turn, on one live batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magicdec.batch import Plan
from magicdec.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from magicdec.deployments.bench_text import neighbouring_windows, read_text
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import Request, SamplingParams
from tests.benchmarks.gpu.turns import ROUNDS_A_TURN, play_turn

_BLOCK_SIZE, _SPARE_BLOCKS = 64, 4


def end_to_end_rows(
    folder: Path,
    points: Sequence[tuple[int, int]],  # batch, context
    draft: tuple[int, int],  # drafts a round, over so many positions
    num_rounds: int,
    dtype: str = "bfloat16",
) -> list[dict[str, Any]]:
    """Tokens a second of the whole batch, sampled at temperature 0.8, and the share of drafts that
    is accepted. Raises ConfigError where there is too little text."""
    tokenizer = load_tokenizer(str(folder))
    ids = list(tokenizer(read_text(None))["input_ids"])
    arms = {"plain": Plan("recycled", 0, draft[1]), "drafted": Plan("recycled", *draft)}
    found = []
    for batch, context in points:
        prompts = neighbouring_windows(ids, batch, context)
        answer = 2 * (num_rounds + ROUNDS_A_TURN) * (draft[0] + 1) + _BLOCK_SIZE
        blocks = batch * (-(-(context + answer) // _BLOCK_SIZE) + _SPARE_BLOCKS)
        config = EngineConfig(
            ModelConfig(str(folder), dtype),
            CacheConfig(_BLOCK_SIZE, num_blocks=blocks),
            SchedulerConfig(max_num_seqs=batch, max_batch_tokens=max(512, 64 * batch)),
        )
        facts = read_model_facts(str(folder))
        engine = Engine(config, LocalExecutor(config), tokenizer, facts)
        _begin(engine, prompts, answer)
        figures = _rounds(engine, arms, num_rounds)
        found.append({"model": folder.name, "batch": batch, "context": context, **figures})
    return found


def _begin(engine: Engine, prompts: Sequence[Sequence[int]], answer: int) -> None:
    """Until all decode."""
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.8, seed=i, max_tokens=answer, ignore_eos=True)
        engine.add(Request(f"r{i}", tuple(prompt), sampling))
    begun: set[str] = set()
    while len(begun) < len(prompts):
        begun |= {output.request_id for output in engine.step()}


def _rounds(engine: Engine, arms: dict[str, Plan], num_rounds: int) -> dict[str, float]:
    """In turns."""
    tokens, seconds = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
    stats = engine.stats
    drafted = accepted = 0
    for turn in range(1 + num_rounds // ROUNDS_A_TURN):
        for name, plan in arms.items():
            before = stats.num_draft_tokens, stats.num_accepted_tokens
            played = play_turn(engine, plan)
            if turn > 0:
                seconds[name] += sum(each.seconds for each in played)
                tokens[name] += sum(each.num_tokens for each in played)
                drafted += stats.num_draft_tokens - before[0]
                accepted += stats.num_accepted_tokens - before[1]
    rates = {name: tokens[name] / seconds[name] for name in arms}
    return {
        "plain_tokens_s": round(rates["plain"], 1),
        "drafted_tokens_s": round(rates["drafted"], 1),
        "gain": round(rates["drafted"] / rates["plain"], 3),
        "accepted": round(accepted / max(drafted, 1), 3),
    }
