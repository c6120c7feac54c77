"""The router against Serve's own choice: time to first token by length, at 0.8 of capacity.

python -m tests.benchmarks.bench_router --seeds 0 1 2 --out router.jsonl --trace-out trace.jsonl
python -m tests.benchmarks.bench_router --report --out router.jsonl

The same seeded traces run through two applications that differ in the choice alone: this
project's Router, and Serve's power of two choices, without a queue. Each arm is a fresh app,
warmed up by text that is not in the trace; arms alternate. Requests are sent at their time whatever
becomes of the others. Capacity is measured first, by a closed loop over a part of the trace on the
router's arm. `magicdec simulate --trace` replays a trace. The p90 of a length class is the time of
one or two requests of a trace of 80: several seeds say more than repetitions of one.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from magicdec.deployments.bench_text import read_text
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.deployments.local_ray import start_local_ray
from magicdec.deployments.settings import ServeSettings, load_settings
from magicdec.model_loader import load_tokenizer
from magicdec.simulation.trace import PoissonTraffic, TraceRequest
from tests.benchmarks.bench_acceptance import machine_name
from tests.benchmarks.bench_router_apps import BenchedApp, deployed
from tests.benchmarks.bench_router_client import Call
from tests.benchmarks.bench_router_records import (
    ARMS,
    ROUTER,
    Repetition,
    Results,
    begin,
    first_token_times,
    make_records,
    makespan_s,
    quantile,
)
from tests.benchmarks.bench_router_report import render
from tests.benchmarks.bench_router_trace import (
    TokenIds,
    cut_prompts,
    make_trace,
    sample,
    scale_arrivals,
    write_trace,
)

PORT = 8181
WARM_UP_TOKENS = 600  # of a prompt
_MOST_WARM_UP_TOKENS = 10 * WARM_UP_TOKENS  # of one application, a replica


def main() -> None:
    args = parse_arguments()
    if args.report:
        print(render(Results.read(args.out)))
        return
    settings = settings_of(args)
    traces = {seed: make_trace(traffic_of(args, seed)) for seed in args.seeds}
    tokenizer = load_tokenizer(settings.model.path)
    token_ids = tokenizer(read_text(args.text), add_special_tokens=False)["input_ids"]
    num_warm_up = _MOST_WARM_UP_TOKENS * args.replicas
    warm_up, text = token_ids[:num_warm_up], token_ids[num_warm_up:]
    start_local_ray(settings.server, show_worker_logs=False)
    try:
        capacity = args.capacity
        if capacity is None:
            requests = traces[args.seeds[0]]
            prompts = cut_prompts(requests, text)
            capacity = measure_capacity(settings, requests, prompts, warm_up, args)
        for seed, requests in traces.items():
            rate = args.load * capacity / sum(map(_size, requests)) * len(requests)
            traces[seed] = scale_arrivals(requests, 1.0 / rate)
            if args.trace_out is not None:
                write_trace(trace_path(args.trace_out, seed, args.seeds), traces[seed])
        results = begin(args.out, run_facts(args, capacity))
        for i, seed in enumerate(args.seeds * args.repeat):
            for arm in args.arms[:: 1 if i % 2 == 0 else -1]:
                with deployed(settings, arm, args.timeout) as app:
                    app.warm_up(warm_up, WARM_UP_TOKENS, args.output_tokens)
                    run_arm(app, arm, Repetition(i, seed), traces[seed], text, results, args.out)
    finally:
        ray.shutdown()
    print(render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("router.jsonl"), help="raw records; must not exist yet")
    add(
        "--trace-out",
        type=Path,
        help="the trace, for `magicdec simulate --trace`; of several seeds, one file each",
    )
    add("--report", action="store_true", help="only print the tables of --out")
    add("--model", default=EMBEDDED_MODEL_NAME)
    add("--dtype", default="bfloat16")
    add("--text", type=Path, help="a long plain-text file; else Python's library")
    add("--settings", type=str, help="a server's YAML file; what is given here goes first")
    add("--replicas", type=int, default=2)
    add("--threads", type=int, default=1, help="of a replica")
    add("--kv-cache-gib", type=float, default=2.0, help="of a replica")
    add("--requests", type=int, default=80)
    add("--prompt-tokens", type=int, nargs=2, default=[100, 4000], help="log-uniform bounds")
    add("--output-tokens", type=int, default=32)
    add("--prefix-share", type=float, default=0.3, help="of the requests")
    add("--prefix-tokens", type=int, default=1000)
    add("--load", type=float, default=0.8, help="arrivals, as a share of capacity")
    add("--capacity", type=float, help="prompt and output tokens a second; else it is measured")
    add("--capacity-requests", type=int, default=24, help="of the trace, to measure it with")
    add("--capacity-at-once", type=int, default=8, help="the closed loop's concurrency")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--seeds", type=int, nargs="+", default=[0], help="one trace each")
    add("--timeout", type=float, default=600.0, help="seconds; then a request has failed")
    add("--repeat", type=int, default=1, help="of every trace")
    args = parser.parse_args()
    if not args.report and args.out.exists():
        parser.error(f"--out {args.out} exists; --report prints it")
    return args


def settings_of(args: argparse.Namespace) -> ServeSettings:
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "path": resolve_model(args.model),
            "dtype": args.dtype,
            "served_name": Path(args.model).name,
        },
        "cache": {"kv_cache_gib": args.kv_cache_gib},
        "parallel": {"num_threads": args.threads},
        "server": {"port": PORT, "num_replicas": args.replicas},
    }
    return load_settings(args.settings, changes)


def traffic_of(args: argparse.Namespace, seed: int) -> PoissonTraffic:
    """One arrival a second in the mean; the rate follows when the capacity is known."""
    return PoissonTraffic(
        num_requests=args.requests,
        requests_per_s=1.0,
        prompt_tokens=tuple(args.prompt_tokens),
        output_tokens=(args.output_tokens, args.output_tokens),
        prefix_share=args.prefix_share,
        num_prefix_tokens=args.prefix_tokens,
        seed=seed,
    )


def measure_capacity(
    settings: ServeSettings,
    requests: Sequence[TraceRequest],
    prompts: Sequence[TokenIds],
    warm_up: Sequence[int],
    args: argparse.Namespace,
) -> float:
    """Tokens a second, of prompts and answers, all replicas busy: what is cached counts too.

    Raises RuntimeError where a request fails.
    """
    chosen = sample(requests, args.capacity_requests)
    calls = [Call(i, prompts[i], requests[i].max_tokens) for i in chosen]
    with deployed(settings, ROUTER, args.timeout) as app:
        app.warm_up(warm_up, WARM_UP_TOKENS, args.output_tokens)
        answers = app.client.closed_loop(calls, args.capacity_at_once)
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise RuntimeError(f"a request failed while capacity was measured: {errors[0]}")
    seconds = max(a.done for a in answers) - min(a.sent for a in answers)
    capacity = sum(_size(requests[i]) for i in chosen) / seconds
    print(f"capacity: {capacity:.0f} tokens/s, by {len(chosen)} requests in {seconds:.0f} s")
    return capacity


def run_arm(
    app: BenchedApp,
    arm: str,
    repetition: Repetition,
    requests: Sequence[TraceRequest],
    text: Sequence[int],
    results: Results,
    out: Path,
) -> None:
    before = app.router_stats()
    answers = app.client.open_loop(requests, cut_prompts(requests, text))
    stats = app.router_stats()
    stats["num_chosen"] = stats["num_released"] - before["num_released"]
    records = make_records(arm, repetition, requests, answers, app.arrivals())
    results.append(out, records, {"arm": arm, "repetition": repetition.number, **stats})
    times = first_token_times(records)
    print(
        f"{arm}, seed {repetition.seed}: {makespan_s(records):.0f} s, time to first token "
        f"p50 {quantile(times, 0.5):.2f} s, p90 {quantile(times, 0.9):.2f} s, "
        f"{sum(r.error is not None for r in records)} failed"
    )


def trace_path(path: Path, seed: int, seeds: Sequence[int]) -> Path:
    return path if len(seeds) == 1 else path.with_stem(f"{path.stem}-{seed}")


def run_facts(args: argparse.Namespace, capacity: float) -> dict[str, Any]:
    """Folders are left out: results are published."""
    words = [re.sub(r"[^=]*/", "", word) for word in sys.argv[1:]]
    return {
        "command": f"make bench BENCH=router BENCH_ARGS={shlex.quote(shlex.join(words))}",
        "machine": machine_name(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "model": args.model,
        "dtype": args.dtype,
        "replicas": args.replicas,
        "threads": args.threads,
        "requests": args.requests,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "prefix_tokens": args.prefix_tokens,
        "prefix_share": args.prefix_share,
        "load": args.load,
        "capacity": round(capacity, 1),
        "seeds": args.seeds,
        "repeat": args.repeat,
    }


def _size(request: TraceRequest) -> int:
    return request.num_prompt_tokens + request.num_output_tokens


if __name__ == "__main__":
    main()
