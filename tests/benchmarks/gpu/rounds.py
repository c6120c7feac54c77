"""Whole rounds of the engine over a model with random weights: what the host adds to a step."""

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from magicdec.batch import Batch, Plan, StepResult
from magicdec.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from magicdec.control.round_policy import FixedPolicy
from magicdec.engine import Engine
from magicdec.model_loader import LoadedModel, read_model_facts
from magicdec.profiling.device_rates import RankDevice
from magicdec.runner import ModelRunner
from magicdec.types import Request, SamplingParams

_TURN = 6  # rounds of one kind; in the first graphs are captured and views chosen


class _Executor:
    """A runner in this process, over a model that is there already."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self._runner = ModelRunner(model, config)
        self._runner.allocate_cache(self._runner.num_affordable_blocks())

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def attention_backend(self) -> str:
        return self._runner.attention_backend

    def measure_device(self) -> RankDevice:
        return self._runner.measure_device()

    def execute(self, batch: Batch) -> StepResult:
        return self._runner.execute(batch)

    def shutdown(self) -> None:
        """Nothing to stop."""


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
    answer = (num_rounds + 2 * _TURN) * (draft[0] + 2) + 1
    config = EngineConfig(
        ModelConfig(str(folder), "bfloat16"),
        CacheConfig(block_size, num_blocks=batch * (-(-(context + answer) // block_size) + 1)),
        SchedulerConfig(max_num_seqs=batch, max_batch_tokens=max(2048, 64 * batch)),
    )
    facts = read_model_facts(str(folder))
    engine = Engine(config, _Executor(model, config), _tokenizer(facts.vocab_size), facts)
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
    """In turns of a few rounds. But for a turn's last one a plain round begins the next."""
    plans = (Plan("streaming", 0, draft[1]), Plan("streaming", *draft))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(1 + num_rounds // _TURN):
        for plan, measured in zip(plans, times, strict=True):
            for left in reversed(range(_TURN)):
                engine.policy = FixedPolicy(
                    replace(plan, stands=plan.draft_length == 0 and left > 0)
                )
                started = time.perf_counter()
                engine.step()
                if turn > 0:
                    measured.append(time.perf_counter() - started)
    plain, drafted = (round(1e3 * statistics.median(each), 2) for each in times)
    return plain, drafted
