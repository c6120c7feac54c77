"""How tokens a second and memory grow with context and batch: a table and a picture.

python -m tests.benchmarks.bench_growth --text book.txt --out growth
python -m tests.benchmarks.bench_growth --report --out growth

Each batch size is a process of its own. Plain and adaptive rounds take turns on one live batch,
and each pair begins with new requests. The memory is what the process holds, less the blocks of its
pool that the point does not fill.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoConfig

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.live_bench import PLAIN, answer_tokens
from magicdec.roofline import ModelGeometry
from tests.benchmarks.bench_grid import append, read_records
from tests.benchmarks.growth_report import draw, render
from tests.benchmarks.policy_arms import ADAPTIVE, Bench, describe

_BLOCK = 64
_ARMS = (PLAIN, ADAPTIVE)


def main() -> None:
    args = parse_arguments()
    records = args.out / "growth.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        for batch_size in args.batch:
            measure(batch_size, records, args)
    found = read_records(records)
    table = render(found)
    (args.out / "growth.md").write_text(table, encoding="utf-8")
    draw(found, args.out / "growth.png")
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--text", type=Path, help="a long plain-text file; else Python's library")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048, 4096, 7000])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved, at every point")
    parser.add_argument("--rounds", type=int, default=6, help="of each arm, a pair")
    parser.add_argument("--settle", type=int, default=24, help="adaptive rounds before a point")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--out", type=Path, required=True, help="folder; appended to")
    parser.add_argument("--report", action="store_true", help="print what the folder holds")
    return parser.parse_args()


def measure(batch_size: int, records: Path, args: argparse.Namespace) -> None:
    """In a new process. Raises SystemExit where it fails."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=measure_batch, args=(batch_size, records, args))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"batch {batch_size}: the process ended with {process.exitcode}")


def measure_batch(batch_size: int, records: Path, args: argparse.Namespace) -> None:
    longest, num_rounds = max(args.context), max(args.rounds, args.settle)
    room = batch_size * (longest + 2 * _BLOCK + answer_tokens(num_rounds, len(_ARMS)))
    bench = Bench(args.model, args.dtype, room, batch_size)
    pool = bench.live.engine.load().total_kv_tokens
    kv_bytes = kv_bytes_per_token(bench)
    prompts = bench.token_prompts(bench.token_ids(args.text), batch_size, longest)
    append(records, {"run": {**describe(bench), "batch": batch_size}})
    for context_len in sorted(args.context):
        began = time.perf_counter()
        cut = [prompt[:context_len] for prompt in prompts]
        bench.prefill(cut)
        point = {"batch": batch_size, "context": context_len}
        point["unused_kv_bytes"] = (pool - batch_size * context_len) * kv_bytes
        append(records, {**point, **measure_point(bench, cut, args)})
        print(f"{batch_size} x {context_len}: {time.perf_counter() - began:.0f} s", flush=True)


def kv_bytes_per_token(bench: Bench) -> int:
    config = AutoConfig.from_pretrained(bench.config.model.path)
    width = 4 if bench.config.model.dtype == "float32" else 2
    return ModelGeometry.from_config(config, kv_element_bytes=width).kv_bytes_per_token


def measure_point(
    bench: Bench, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Tokens/s of either arm, a number a pair, and what the process holds then."""
    sampling = {"temperature": args.temperature}
    bench.compare((ADAPTIVE,), prompts, args.settle, seed=101, **sampling)
    rates: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    for pair in range(args.pairs):
        order = _ARMS[pair % 2 :] + _ARMS[: pair % 2]
        for arm, found in bench.compare(order, prompts, args.rounds, seed=pair, **sampling).items():
            rates[arm].append(found.rate)
    ratios = [a / b for a, b in zip(rates[ADAPTIVE], rates[PLAIN], strict=True)]
    return {
        **{arm: statistics.median(found) for arm, found in rates.items()},
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "held_bytes": psutil.Process().memory_full_info().pss,
    }


if __name__ == "__main__":
    main()
