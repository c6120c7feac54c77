"""Adaptive drafts against plain decoding and fixed drafts, over batch sizes and contexts.

python -m tests.benchmarks.bench_grid --text book.txt --out grid.jsonl
python -m tests.benchmarks.bench_grid --report --out grid.jsonl

All prompts are prefilled once; every pair begins anew from the prefix cache, at the length of its
point. Within a pair all arms take turns on one live batch, round by round, so that what else the
machine does falls on all of them, and so does a refresh of `recycled`. Pairs that the file holds
are not run again; one adaptive policy sees the whole run, and some rounds of every point before it
is timed there: how fast it learns is what bench_workload measures.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.live_bench import PLAIN, answer_tokens
from tests.benchmarks.grid_report import render
from tests.benchmarks.policy_arms import ADAPTIVE, ARMS, Bench, describe

_BLOCK = 64


def main() -> None:
    args = parse_arguments()
    records = read_records(args.out)
    if not args.report:
        run(args, records)
        records = read_records(args.out)
    print(render(records))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--text", type=Path, help="a long plain-text file; else Python's library")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048, 4096, 7000])
    parser.add_argument("--pairs", type=int, default=7, help="interleaved, at every point")
    parser.add_argument("--seconds", type=float, default=2.0, help="of plain rounds, a pair")
    parser.add_argument("--least-rounds", type=int, default=4, help="of each arm, a pair")
    parser.add_argument("--most-rounds", type=int, default=24)
    parser.add_argument("--settle", type=int, default=24, help="adaptive rounds before a point")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--out", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--report", action="store_true", help="print what the file holds")
    return parser.parse_args()


def read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    batch, context = max(args.batch), max(args.context)
    answers = batch * (answer_tokens(args.most_rounds, len(ARMS)) + 2 * _BLOCK)
    bench = Bench(args.model, args.dtype, batch * (context + _BLOCK) + answers, batch)
    prompts = bench.token_prompts(bench.token_ids(args.text), batch, context)
    if not records:
        append(args.out, {"run": describe(bench)})
    done = {(r["batch"], r["context"], r["pair"]) for r in records if "arm" in r}
    started = time.perf_counter()
    bench.prefill(prompts)
    print(f"prefill of {batch} x {context}: {time.perf_counter() - started:.0f} s", flush=True)
    for batch_size in sorted(args.batch, reverse=True):
        for context_len in sorted(args.context):
            cut = [prompt[:context_len] for prompt in prompts[:batch_size]]
            measure_point(bench, cut, done, args)


def measure_point(
    bench: Bench, prompts: list[list[int]], done: set[tuple[int, int, int]], args: Any
) -> None:
    """One pair to warm up, then the others, each beginning with another arm."""
    point = len(prompts), len(prompts[0])
    if all((*point, pair) in done for pair in range(args.pairs)):
        return
    sampling = {"temperature": args.temperature}
    if args.settle > 0:
        bench.compare((ADAPTIVE,), prompts, args.settle, seed=101, **sampling)
    warm = bench.compare(ARMS, prompts, args.least_rounds, seed=100, **sampling)[PLAIN]
    wanted = round(args.seconds / (warm.seconds / len(warm.rounds)))
    num_rounds = max(args.least_rounds, min(args.most_rounds, wanted))
    for pair in range(args.pairs):
        if (*point, pair) in done:
            continue
        turn = pair % len(ARMS)
        arms = (*ARMS[turn:], *ARMS[:turn])
        for arm, found in bench.compare(arms, prompts, num_rounds, seed=pair, **sampling).items():
            place = {"batch": point[0], "context": point[1], "pair": pair, "arm": arm}
            append(args.out, {**place, **asdict(found)})
    print(f"{point[0]} x {point[1]}: {num_rounds} rounds of each arm, a pair", flush=True)


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
