"""Decode rate of the bare engine, plain against self-speculation, interleaved in one run.

python -m tests.benchmarks.bench_decode --batch 8 --context 7000 --draft-length 4 --draft-budget 512

Prompts are consecutive windows of real text. They are prefilled once; then segments of the same
streams alternate, plain and under each drafter.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from magicdec.batch import Plan
from magicdec.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.control.round_policy import FixedPolicy
from magicdec.deployments.bench_text import read_text
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.stats import EngineStats
from magicdec.types import Request, SamplingParams
from tests.benchmarks.acceptance_rounds import distinct_4grams


def main() -> None:
    args = parse_arguments()
    path = resolve_model(args.model)
    num_plans = 1 + len(args.drafter)
    most_output = args.segment * num_plans * (args.rounds + 1) + 64
    tokens_needed = args.batch * (args.context + most_output)
    config = EngineConfig(
        model=ModelConfig(path, args.dtype),
        cache=CacheConfig(num_blocks=-(-tokens_needed // 64) + 2 * args.batch),
        scheduler=SchedulerConfig(max_num_seqs=args.batch),
        speculation=SpeculativeConfig(
            max_view_share=1.0, selection=SelectionConfig(refresh_rounds=args.refresh_rounds)
        ),
    )
    tokenizer = load_tokenizer(path)
    engine = Engine(config, LocalExecutor(config), tokenizer, read_model_facts(path))
    text_ids = tokenizer(read_text(args.text))["input_ids"]
    sampling = SamplingParams(temperature=args.temperature, max_tokens=most_output, ignore_eos=True)
    for i in range(args.batch):
        prompt = tuple(text_ids[i * args.context : (i + 1) * args.context])
        if len(prompt) < args.context:
            raise SystemExit(f"{args.text} holds {len(text_ids)} tokens: too few for the batch")
        engine.add(Request(str(i), prompt, sampling))
    print(
        f"{args.model} {args.dtype}, {args.batch} x {args.context} tokens, "
        f"draft length {args.draft_length} over {args.draft_budget}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    prefill(engine, args.batch * args.context, args)
    plans = {"plain": Plan(args.drafter[0], 0, args.draft_budget)}
    plans |= {d: Plan(d, args.draft_length, args.draft_budget) for d in args.drafter}
    measure(engine, plans, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--text", type=Path, help="a long plain-text file; else Python's library")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--drafter", nargs="+", default=[SpeculativeConfig().drafter])
    parser.add_argument(
        "--refresh-rounds", type=int, default=SelectionConfig().refresh_rounds, help="of recycled"
    )
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--draft-budget", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of segments")
    parser.add_argument("--segment", type=int, default=12, help="tokens a sequence and segment")
    return parser.parse_args()


def prefill(engine: Engine, num_tokens: int, args: argparse.Namespace) -> None:
    """Plain steps until every prompt is in the cache; early ones decode a little meanwhile."""
    # The prompt seeds the selection of one drafter, and only `snapkv` never selects again.
    seeded = "snapkv" if "snapkv" in args.drafter else args.drafter[0]
    engine.policy = FixedPolicy(Plan(seeded, 0, args.draft_budget))
    started = time.perf_counter()
    while engine.stats.num_prefill_tokens < num_tokens:
        engine.step()
    seconds = time.perf_counter() - started
    print(f"prefill: {num_tokens} tokens in {seconds:.0f} s, {num_tokens / seconds:.0f}/s")


def measure(engine: Engine, plans: dict[str, Plan], args: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {name: [] for name in plans}
    answers: dict[str, list[int]] = {}
    for pair in range(args.rounds + 1):
        for name, plan in plans.items():
            rate, line = segment(engine, plan, args.segment * args.batch, answers)
            if pair > 0:  # the first pair warms up
                rates[name].append(rate)
            print(f"  {'warm-up' if pair == 0 else f'round {pair}':8} {name:12} {line}")
    for name, values in rates.items():
        ratios = [s / p for p, s in zip(rates["plain"], values, strict=True)]
        print(
            f"{name:12} median {statistics.median(values):6.1f} tokens/s {spread(values)}, "
            f"ratio to plain {statistics.median(ratios):.2f} {spread(ratios)}"
        )
    share = distinct_4grams(answers.values())
    print(f"distinct 4-grams of the text: {share:.0%} (a loop drafts itself)")


def segment(
    engine: Engine, plan: Plan, num_tokens: int, answers: dict[str, list[int]]
) -> tuple[float, str]:
    """Decodes at least num_tokens tokens under one plan; returns tokens/s and a line about it."""
    engine.policy = FixedPolicy(plan)
    before = EngineStats(**{f: getattr(engine.stats, f) for f in EngineStats.__slots__})
    stats = engine.stats
    emitted = 0
    while emitted < num_tokens:
        for output in engine.step():
            emitted += len(output.token_ids)
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    rounds = stats.num_rounds - before.num_rounds
    draft = stats.draft_seconds - before.draft_seconds
    verify = stats.verify_seconds - before.verify_seconds
    rows = stats.num_decode_rows - before.num_decode_rows
    steps = (
        f"draft step {draft / rounds / plan.draft_length * 1e3:5.1f} ms  " if draft > 0.01 else ""
    )
    name = "verify" if plan.draft_length else "plain step"
    line = (
        f"{emitted / (draft + verify):6.1f} tokens/s  {emitted / rows:.2f} tokens a round  "
        f"{steps}{name} {verify / rounds * 1e3:6.1f} ms"
    )
    return emitted / (draft + verify), line


def spread(values: list[float]) -> str:
    return f"[{min(values):.2f} .. {max(values):.2f}]"


if __name__ == "__main__":
    main()
