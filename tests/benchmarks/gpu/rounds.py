"""Whole rounds of the engine over a model with random weights: what the host adds to a step."""

import gc
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from magicdec.batch import Plan
from magicdec.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import LoadedModel, read_model_facts
from magicdec.runner import ModelRunner
from magicdec.types import Request, SamplingParams
from tests.benchmarks.gpu.turns import ROUNDS_A_TURN, play_turn


def round_rows(
    model: LoadedModel,
    shape: PretrainedConfig,
    points: Sequence[tuple[int, int]],  # batch, context
    draft: tuple[int, int],  # drafts a round, over so many positions
    block_size: int,
    num_rounds: int,
) -> list[dict[str, Any]]:
    """Milliseconds of plain and drafted rounds, greedy, median of so many each."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        for batch, context in points:
            engine = _engine(model, Path(folder), batch, context, draft, block_size, num_rounds)
            plain, drafted = _rounds(engine, draft, num_rounds)
            row = {"plain_round_ms": plain, "drafted_round_ms": drafted}
            found.append({"batch": batch, "context": context, **row})
            del engine
            gc.collect()  # a runner and what it captures know each other
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _engine(
    model: LoadedModel,
    folder: Path,
    batch: int,
    context: int,
    draft: tuple[int, int],
    block_size: int,
    num_rounds: int,
) -> Engine:
    """All of whose sequences decode."""
    answer = (num_rounds + 2 * ROUNDS_A_TURN) * (draft[0] + 2) + 1
    config = EngineConfig(
        ModelConfig(str(folder), "bfloat16"),
        CacheConfig(block_size, num_blocks=batch * (-(-(context + answer) // block_size) + 1)),
        SchedulerConfig(max_num_seqs=batch, max_batch_tokens=max(2048, 64 * batch)),
    )
    facts = read_model_facts(str(folder))
    engine = Engine(
        config,
        LocalExecutor(config, ModelRunner(model, config)),
        _tokenizer(facts.vocab_size),
        facts,
    )
    for i in range(batch):
        prompt = (i % facts.vocab_size, *(n % facts.vocab_size for n in range(1, context)))
        sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
        engine.add(Request(f"r{i}", prompt, sampling))
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in engine.step()}
    return engine


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Its tokens are words of bytes, as those of the models that these shapes are of."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _rounds(engine: Engine, draft: tuple[int, int], num_rounds: int) -> tuple[float, float]:
    """Plain and drafted ones, in turns."""
    plans = (Plan("streaming", 0, draft[1]), Plan("streaming", *draft))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(1 + num_rounds // ROUNDS_A_TURN):
        for plan, measured in zip(plans, times, strict=True):
            seconds = [played.seconds for played in play_turn(engine, plan)]
            measured += seconds if turn > 0 else []
    plain, drafted = (round(1e3 * statistics.median(each), 2) for each in times)
    return plain, drafted
