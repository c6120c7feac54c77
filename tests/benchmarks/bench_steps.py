"""One step of the engine against the bytes that it must read: plain, draft, verify, and prefill.

python -m tests.benchmarks.bench_steps --threads 2

The floor of a step is its weights and its K/V at the rate of a compiled read. Shapes take turns, so
that a machine whose speed drifts slows all of them. Pages hold noise: no prompt is computed.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoConfig

from magicdec.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.executor import LocalExecutor
from magicdec.model_loader import read_model_facts
from magicdec.profiling.device_rates import device_name
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.roofline import ModelGeometry
from magicdec.types import SamplingParams
from tests.benchmarks.bench_attention import compiled_read

_DRAFT_LENGTH = 4
_CHUNK = 512  # rows of a prompt


@dataclass
class Timed:
    """Seconds of one shape's steps."""

    plain: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)  # one draft step
    verify: list[float] = field(default_factory=list)

    def take(self, executor: LocalExecutor, pool: ProbePool, plain: Probe, drafted: Probe) -> None:
        ids, sampling = range(plain.batch_size), SamplingParams()
        self.plain.append(executor.execute(pool.batch(plain, ids, sampling)).verify_seconds)
        result = executor.execute(pool.batch(drafted, ids, sampling))
        self.draft.append(result.draft_seconds / drafted.draft_length)
        self.verify.append(result.verify_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[500, 7000])
    parser.add_argument("--budget", type=int, default=512, help="of a draft, in KV positions")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = EngineConfig(
        ModelConfig(resolve_model(args.model), args.dtype),
        CacheConfig(kv_cache_bytes=4 << 30),
        parallel=ParallelConfig(num_threads=args.threads),
    )
    executor = LocalExecutor(config)
    facts = read_model_facts(config.model.path)
    pool = ProbePool(config, executor.num_blocks, facts.max_position_embeddings)
    geometry = ModelGeometry.from_config(
        AutoConfig.from_pretrained(config.model.path),
        weight_element_bytes=executor.measure_device().weight_element_bytes,
    )
    read = compiled_read(args.threads)
    rate = max(read() for _ in range(5))
    name = device_name(torch.device("cpu"))
    print(f"{name}, {args.threads} threads, {args.dtype}; reads {rate / 1e9:.1f} GB/s\n")
    found = decode_steps(executor, pool, args)
    print("| batch x context | step | ms | floor | over it |\n| --- | --- | --- | --- | --- |")
    for (batch, context), timed in found.items():
        for step, seconds, num_read in (
            ("plain", timed.plain, context),
            (f"draft, {args.budget}", timed.draft, min(context, args.budget)),
            (f"verify of {_DRAFT_LENGTH + 1} rows", timed.verify, context),
        ):
            num_bytes = geometry.weight_bytes + batch * geometry.kv_bytes_read(num_read)
            print(f"| {batch} x {context:,} | {step} | {row(seconds, num_bytes / rate)}")
    report_prefill(executor, pool, args.context, args.repeats)


def decode_steps(
    executor: LocalExecutor, pool: ProbePool, args: argparse.Namespace
) -> dict[tuple[int, int], Timed]:
    """By batch and context; the first turn warms up."""
    found = {(batch, context): Timed() for context in args.context for batch in args.batch}
    for turn in range(args.repeats + 1):
        for (batch, context), timed in found.items():
            plain = Probe(batch, context)
            drafted = replace(plain, drafter="streaming", draft_length=_DRAFT_LENGTH)
            timed = Timed() if turn == 0 else timed
            timed.take(executor, pool, plain, replace(drafted, draft_budget=args.budget))
    return found


def report_prefill(
    executor: LocalExecutor, pool: ProbePool, contexts: Sequence[int], repeats: int
) -> None:
    print(f"\n| after | tokens/s of a chunk of {_CHUNK} |\n| --- | --- |")
    for context in contexts:
        chunk = Probe(1, context, num_rows=_CHUNK)
        seconds = [
            executor.execute(pool.batch(chunk, range(1), SamplingParams())).verify_seconds
            for _ in range(repeats + 1)
        ][1:]
        rates = sorted(_CHUNK / s for s in seconds)
        print(
            f"| {context:,} | {statistics.median(rates):.0f} [{rates[0]:.0f} .. {rates[-1]:.0f}] |"
        )


def row(seconds: Sequence[float], floor: float) -> str:
    middle = statistics.median(seconds)
    return (
        f"{middle * 1e3:.1f} [{min(seconds) * 1e3:.1f} .. {max(seconds) * 1e3:.1f}] "
        f"| {floor * 1e3:.1f} | {middle / floor:.2f} |"
    )


if __name__ == "__main__":
    main()
