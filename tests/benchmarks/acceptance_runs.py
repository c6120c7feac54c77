"""Running one block of the acceptance benchmark: plain once, then every missing cell."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from magicdec.config import (
    CacheConfig,
    DraftModelConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.control.round_policy import FixedPolicy
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import read_model_facts
from magicdec.types import Request, SamplingParams
from tests.benchmarks.acceptance_cells import (
    PLAIN,
    Block,
    Cell,
    Configuration,
    ResultsFile,
    plain_configuration,
)
from tests.benchmarks.acceptance_rounds import Acceptance, Stream, distinct_4grams, generate
from tests.benchmarks.acceptance_tasks import Prompt
from tests.benchmarks.needle import answer_length

BUCKET = 128  # output positions of one point of a curve
BLOCK_SIZE = 64
MAX_BUDGET = 8192


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    folder: str
    dtype: str
    max_num_seqs: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def settings(self) -> Cell:
        return {"model": self.name, "dtype": self.dtype}


def run_block(
    block: Block,
    configurations: list[Configuration],
    target: Target,
    results: ResultsFile,
    selection: SelectionConfig,
    least_answered: float = 0.0,
) -> bool:
    """Fills what the file lacks; an engine is built only for missing cells.

    Returns False, with nothing drafted, where plain answers less than a share of its questions.
    """
    wanted = [plain_configuration(selection), *configurations]
    missing = [(c, tasks) for c in wanted if (tasks := _missing(block, c, target, results))]
    if not missing or not _answers(block, target, results, least_answered):
        return _answers(block, target, results, least_answered)
    estimate = block.estimate_seconds([c for c, _ in missing]) / 60
    print(f"{block.name}: {len(missing)} configurations, very roughly {estimate:.0f} min")
    started = time.perf_counter()
    num_done = 0
    for draft_model, members in groupby(missing, lambda pair: pair[0].draft_model):
        group = list(members)
        engine = build_engine(block, target, selection, draft_model)
        warm_up(engine, block, group[0][0])
        for configuration, tasks in group:
            run_configuration(engine, block, configuration, tasks, target, results)
            num_done += 1
            spent = time.perf_counter() - started
            left = spent / num_done * (len(missing) - num_done)
            print(
                f"{block.name}: {num_done} of {len(missing)} configurations after {spent:.0f} s, "
                f"about {left / 60:.0f} min left in this block",
                flush=True,
            )
            if not _answers(block, target, results, least_answered):
                break
        engine.check_integrity()
        engine.shutdown()
        del engine  # its KV pool goes before the next one comes
        if not _answers(block, target, results, least_answered):
            return False
    return True


def _answers(block: Block, target: Target, results: ResultsFile, least: float) -> bool:
    """Whether enough prompts count; true while the plain run is still to come."""
    plain = plain_configuration(SelectionConfig())
    found = [results.get(block.cell(task, plain, target.settings)) for task in block.prompts]
    known = [result for result in found if result is not None]
    asked = sum(len(result["token_ids"]) for result in known)
    return sum(len(result["answer_lengths"]) for result in known) >= least * asked


def _missing(
    block: Block, configuration: Configuration, target: Target, results: ResultsFile
) -> list[str]:
    cells = ((t, block.cell(t, configuration, target.settings)) for t in block.prompts)
    return [task for task, cell in cells if results.get(cell) is None]


def build_engine(
    block: Block, target: Target, selection: SelectionConfig, draft_model: DraftModelConfig | None
) -> Engine:
    """A pool that keeps every prompt of the block in the prefix cache while others run."""
    prompts = [p for each in block.prompts.values() for p in each]
    shared = sum(map(len, block.warm_up))
    own = len(prompts) * (block.num_tokens + 2 * BLOCK_SIZE)
    running = target.max_num_seqs * (block.num_tokens + 4 * BLOCK_SIZE)
    config = EngineConfig(
        model=ModelConfig(target.folder, target.dtype),
        cache=CacheConfig(BLOCK_SIZE, num_blocks=-(-(shared + own + running) // BLOCK_SIZE)),
        scheduler=SchedulerConfig(max_num_seqs=target.max_num_seqs),
        speculation=SpeculativeConfig(
            draft_length=0,
            draft_budget=MAX_BUDGET,
            max_draft_budget=MAX_BUDGET,
            max_view_share=1.0,
            selection=selection,
            draft_model=draft_model,
        ),
    )
    facts = read_model_facts(target.folder)
    return Engine(config, LocalExecutor(config), target.tokenizer, facts)


def warm_up(engine: Engine, block: Block, first: Configuration) -> None:
    """Prefills for the drafter that comes first: a draft model fills its own cache meanwhile."""
    engine.policy = FixedPolicy(replace(first.plan, draft_length=0))
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    requests = [Request(f"warm-up-{i}", ids, sampling) for i, ids in enumerate(block.warm_up)]
    started = time.perf_counter()
    stats = engine.stats
    generate(
        engine,
        requests,
        lambda _, seconds: _say(f"{block.name} prefill", stats.num_prefill_tokens, seconds),
    )
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, block.warm_up))
    print(f"{block.name}: prefill of {num_tokens} tokens, {num_tokens / seconds:.0f}/s", flush=True)


def run_configuration(
    engine: Engine,
    block: Block,
    configuration: Configuration,
    tasks: list[str],
    target: Target,
    results: ResultsFile,
) -> None:
    """All missing tasks of one configuration in one batch."""
    plain = {} if configuration.drafter == PLAIN else _plain(block, tasks, target, results)
    prompts = [p for task in tasks for p in block.prompts[task] if not plain or p.name in plain]
    engine.policy = FixedPolicy(configuration.plan)
    label = f"{block.name} {configuration.label}"
    started = time.perf_counter()
    streams = generate(
        engine, list(_requests(block, prompts)), lambda done, s: _say(label, done, s)
    )
    seconds = time.perf_counter() - started
    if all(stream.cached_tokens == 0 for stream in streams.values()):
        print(f"{label}: nothing came from the prefix cache", flush=True)
    for task in tasks:
        mine = {p.name: streams[p.name] for p in block.prompts[task] if p.name in streams}
        if configuration.drafter == PLAIN:
            result = plain_result(block, mine, target.tokenizer)
        else:
            result = draft_result(mine, plain)
        result["seconds"] = round(seconds * len(mine) / max(len(streams), 1), 1)
        results.append(block.cell(task, configuration, target.settings), result)
        print(f"  {task:9} {configuration.label:16} {_summary(result)}", flush=True)


def _plain(
    block: Block, tasks: list[str], target: Target, results: ResultsFile
) -> dict[str, tuple[list[int], int]]:
    """Prompt name -> the plain stream and the length of its answer, for prompts that count."""
    found: dict[str, tuple[list[int], int]] = {}
    for task in tasks:
        cell = block.cell(task, plain_configuration(SelectionConfig()), target.settings)
        result = results.get(cell)
        assert result is not None, "the plain configuration comes first"
        for name, length in result["answer_lengths"].items():
            found[name] = (result["token_ids"][name], length)
    return found


def _requests(block: Block, prompts: list[Prompt]) -> Iterator[Request]:
    for prompt in prompts:
        sampling = SamplingParams(
            temperature=block.temperature,
            seed=prompt.seed,
            max_tokens=block.num_tokens,
            ignore_eos=True,
        )
        yield Request(prompt.name, prompt.token_ids, sampling)


def plain_result(
    block: Block, streams: dict[str, Stream], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The streams, and how much of each counts: all of it, or the answer where one is given."""
    token_ids = {name: stream.token_ids for name, stream in streams.items()}
    lengths = {name: len(ids) for name, ids in token_ids.items()}
    if block.answer_codes is not None:
        answers = {
            n: answer_length(block.answer_codes[n], token_ids[n], tokenizer) for n in lengths
        }
        lengths = {name: length for name, length in answers.items() if length is not None}
    return {
        "token_ids": token_ids,
        "answer_lengths": lengths,
        "distinct_4grams": round(distinct_4grams(token_ids.values()), 4),
    }


def draft_result(
    streams: dict[str, Stream], plain: dict[str, tuple[list[int], int]]
) -> dict[str, Any]:
    total = Acceptance(BUCKET)
    for name, stream in streams.items():
        total.add(stream, *plain[name])
    return total.record()


def _summary(result: dict[str, Any]) -> str:
    if "accepted" not in result:
        return f"{result['distinct_4grams']:.0%} distinct 4-grams, {result['seconds']:.0f} s"
    return (
        f"{result['accepted']} of {result['examined']} accepted "
        f"({result['accepted'] / max(result['examined'], 1):.1%}), {result['rounds']} rounds, "
        f"{result['diverged']} of {result['streams']} streams diverged, {result['seconds']:.0f} s"
    )


def _say(label: str, num_tokens: int, seconds: float) -> None:
    print(
        f"  {label}: {num_tokens} tokens after {seconds:.0f} s, {num_tokens / seconds:.1f}/s",
        flush=True,
    )
