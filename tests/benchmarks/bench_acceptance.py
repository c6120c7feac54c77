"""Acceptance by drafter, draft budget and task, through the real engine; Markdown tables of it.

python -m tests.benchmarks.bench_acceptance --corpus documents.jsonl.zst --out results.jsonl
python -m tests.benchmarks.bench_acceptance --report --out results.jsonl --markdown acceptance.md

Under shared noise the emitted tokens are the plain stream's whoever drafts, so every configuration
is judged on the same text. A configuration runs all prompts of a block in one batch; the prefix
cache keeps them from being prefilled again. Cells that the results file holds are not run again.
"""

import os
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from magicdec.config import DraftModelConfig, SelectionConfig
from magicdec.deployments.embedded_model import resolve_model
from magicdec.model_loader import load_tokenizer
from magicdec.profiling.device_rates import device_name
from tests.benchmarks.acceptance_cells import (
    VIEW_DRAFTERS,
    Block,
    Configuration,
    ResultsFile,
)
from tests.benchmarks.acceptance_options import parse_arguments, selection_of, small_selection_of
from tests.benchmarks.acceptance_report import render
from tests.benchmarks.acceptance_runs import Target, run_block
from tests.benchmarks.acceptance_tasks import (
    Prompt,
    Window,
    build_prompts,
    read_corpus,
    read_windows,
)
from tests.benchmarks.needle import build_context

ANSWERED_SHARE = 0.3  # below, the needle takes short contexts and small budgets


def main() -> None:
    args = parse_arguments(str(__doc__).splitlines()[0])
    results = ResultsFile(args.out)
    if args.report:
        args.markdown.write_text(render(results), encoding="utf-8")
        print(f"{args.markdown}: {len(results.cells)} cells")
        return
    folder = resolve_model(args.model)
    target = Target(args.model, folder, args.dtype, args.max_num_seqs, load_tokenizer(folder))
    results.append_run(run_facts(args))
    with tempfile.TemporaryDirectory() as scratch:
        args.draft_model = [resolve_model(model) for model in args.draft_model]
        args.draft_model += [save_first_layers(folder, n, scratch) for n in args.draft_layers]
        for name in args.blocks:
            run_named(name, args, target, results)
    args.markdown.write_text(render(results), encoding="utf-8")


def run_named(name: str, args: Namespace, target: Target, results: ResultsFile) -> None:
    windows = read_windows()
    if name == "needle":
        run_needle(args, target, results, [w for w in windows if w.task == "needle"])
        return
    tasks = ("long",) if name == "long" else tuple(args.tasks)
    context = args.long_context if name == "long" else args.context
    num_tokens = args.long_tokens if name == "long" else args.max_tokens
    windows = limited([w for w in windows if w.task in tasks], args.limit)
    corpus = read_corpus(args.corpus, {w.source for w in windows})
    prompts = build_prompts(tasks, windows, corpus, target.tokenizer, context)
    warm_up = [prompt.token_ids for each in prompts.values() for prompt in each]
    temperature = 0.0 if name == "greedy" else args.temperature
    block = Block(name, context, num_tokens, temperature, prompts, warm_up)
    drafters = args.long_drafters if name == "long" else args.drafters
    budgets = args.long_budgets if name == "long" else args.budgets
    selection = selection_of(args)
    plans = configurations(drafters, budgets, args.draft_length, selection, args)
    run_block(block, plans, target, results, selection)


def run_needle(args: Namespace, target: Target, results: ResultsFile, rows: list[Window]) -> None:
    """Long contexts, or where the plain model answers too few of their questions, short ones."""
    windows = limited(rows, args.limit)
    corpus = read_corpus(args.corpus, {w.source for w in windows})
    for context, budgets, selection in (
        (args.context, args.budgets, selection_of(args)),
        (args.small_context, args.small_budgets, small_selection_of(args)),
    ):
        block = needle_block(windows, corpus, target, context, args.needle_tokens)
        length = args.needle_draft_length
        plans = configurations(args.drafters, budgets, length, selection, args)
        least = ANSWERED_SHARE if context == args.context else 0.0
        if run_block(block, plans, target, results, selection, least):
            return
        print(f"needle: under {ANSWERED_SHARE:.0%} answered at {context} tokens")


def needle_block(
    windows: list[Window], corpus: dict[str, str], target: Target, context: int, num_tokens: int
) -> Block:
    prompts: list[Prompt] = []
    codes: dict[str, str] = {}
    warm_up = []
    for i, window in enumerate(windows):
        text = corpus[window.source]
        needle = build_context(window, text, target.tokenizer, context, f"needle-{i}")
        warm_up.append(needle.token_ids)
        for j, fact in enumerate(needle.facts):
            prompt = Prompt("needle", f"{needle.name}-{j}", needle.prompt(j), window.seed)
            prompts.append(prompt)
            codes[prompt.name] = fact.code
    return Block("needle", context, num_tokens, 0.0, {"needle": prompts}, warm_up, codes)


def configurations(
    drafters: list[str],
    budgets: list[int],
    draft_length: int,
    selection: SelectionConfig,
    args: Namespace,
) -> list[Configuration]:
    """In the order of a run: a draft model needs an engine of its own and comes last."""
    found = []
    for drafter in [d for d in drafters if d in VIEW_DRAFTERS]:
        found += [Configuration(drafter, draft_length, b, selection) for b in budgets]
    if "ngram" in drafters:
        found.append(Configuration("ngram", draft_length, None, selection))
    if "draft_model" in drafters:
        for path in args.draft_model:
            for window in args.draft_window:
                model = DraftModelConfig(path, window)
                found.append(Configuration("draft_model", draft_length, None, selection, model))
    return found


def limited(windows: list[Window], limit: int | None) -> list[Window]:
    """The first `limit` windows of each task."""
    seen: dict[str, int] = {}
    kept = []
    for window in windows:
        seen[window.task] = seen.get(window.task, 0) + 1
        if limit is None or seen[window.task] <= limit:
            kept.append(window)
    return kept


def save_first_layers(folder: str, num_layers: int, scratch: str) -> str:
    """The target cut after num_layers: a smaller model of the same vocabulary, untrained as one."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    path = Path(scratch) / f"first-{num_layers}-layers"
    model.save_pretrained(path)
    load_tokenizer(folder).save_pretrained(path)
    return str(path)


def run_facts(args: Namespace) -> dict[str, Any]:
    """Machine and command, folders left out: results are published."""
    words = [re.sub(r"[^=]*/", "", word) for word in sys.argv[1:]]
    return {
        "command": f"make bench BENCH=acceptance BENCH_ARGS={shlex.quote(shlex.join(words))}",
        "machine": machine_name(),
        "torch": torch.__version__,
        "model": args.model,
        "dtype": args.dtype,
    }


def machine_name() -> str:
    """What the model runs on: the GPU where there is one, as the runner chooses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = device_name(torch.device("cpu"))
    return f"{name}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}"


if __name__ == "__main__":
    main()
