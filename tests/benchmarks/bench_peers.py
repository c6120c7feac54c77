"""This project beside vLLM and transformers, on the same weights, prompts and threads.

make bench-peers CORPUS=long-documents.jsonl.zst

A separate environment is made for vLLM. Every contender is a process of its own; prompts are
prefilled once, then the contenders decode in turn, the others stopped meanwhile. One that fails is
shown as such. The HTTP figure is taken afterwards, beside the bare engine again.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from transformers import AutoConfig

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from tests.benchmarks.bench_grid import append, read_records
from tests.benchmarks.peers.contender import ContenderFailed, ContenderProcess, start_all
from tests.benchmarks.peers.contest import Task
from tests.benchmarks.peers.environment import make_environment
from tests.benchmarks.peers.report import PREFILL, describe_machine, draw, render
from tests.benchmarks.peers.specs import ENGINE, HTTP, Settings, engine_specs, http_spec
from tests.benchmarks.peers.workloads import WORKLOADS, Workload, read_prompts

Started = ContenderProcess | str  # a string: why it could not start
Field = Mapping[str, tuple[Started, bool]]  # by name; the second: adaptive, where it has both


def main() -> None:
    args = parse_arguments()
    records = args.out / "peers.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        run(args, records)
    table = render(read_records(records))
    (args.out / "peers.md").write_text(table, encoding="utf-8")
    draw(read_records(records), args.out / "peers.png")
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="JSON lines {source, text}, perhaps .zst")
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved, of each workload")
    parser.add_argument("--workloads", nargs="+", default=[w.name for w in WORKLOADS])
    parser.add_argument("--port", type=int, default=8189, help="of the HTTP contender")
    parser.add_argument("--out", type=Path, default=Path("build/peers"), help="folder; appended to")
    parser.add_argument("--report", action="store_true", help="print what the folder holds")
    args = parser.parse_args()
    if unknown := set(args.workloads) - {w.name for w in WORKLOADS}:
        known = ", ".join(repr(w.name) for w in WORKLOADS)
        parser.error(f"--workloads must be of {known}, got {', '.join(sorted(unknown))}")
    if not args.report and (args.corpus is None or not args.corpus.is_file()):
        parser.error(f"--corpus must be a file of JSON lines {{source, text}}, got {args.corpus}")
    return args


def run(args: argparse.Namespace, records: Path) -> None:
    python = make_environment((args.out / "environment").resolve())
    workloads = [w for w in WORKLOADS if w.name in args.workloads]
    settings = read_settings(args, str(python))
    prompts = read_prompts(args.corpus, settings.model, workloads)
    append(records, {"run": describe_machine(args.threads, sys.argv[1:])})
    started: dict[str, Started] = {}
    # Contenders are stopped while others are asked: left behind, they would keep their memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        start_all(engine_specs(settings, workloads), args.out, started)
        for workload in workloads:
            compete(args, records, workload, prompts[workload.name], field(started))
        close({name: started.pop(name) for name in list(started) if name != ENGINE})
        start_all([http_spec(settings, workloads)], args.out, started)
        served = replace(workloads[0], name=f"{workloads[0].name}, served")
        both = {f"{ENGINE} adaptive": (started[ENGINE], True), HTTP: (started[HTTP], True)}
        compete(args, records, served, prompts[workloads[0].name], both)
    finally:
        close(started)


def read_settings(args: argparse.Namespace, peers_python: str) -> Settings:
    folder = resolve_model(args.model)
    config = AutoConfig.from_pretrained(folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    width = {"float32": 4}.get(args.dtype, 2)
    return Settings(
        folder, args.dtype, args.threads, args.tokens, kv_bytes * width, peers_python, args.port
    )


def field(started: Mapping[str, Started]) -> Field:
    """What competes: this project's engine twice."""
    found: dict[str, tuple[Started, bool]] = {}
    for name, process in started.items():
        if name == ENGINE:
            found |= {f"{name} plain": (process, False), f"{name} adaptive": (process, True)}
        else:
            found[name] = process, True
    return found


def compete(
    args: argparse.Namespace,
    records: Path,
    workload: Workload,
    prompts: list[list[int]],
    contenders: Field,
) -> None:
    """Prefill of each, then rounds in which each decodes, beginning with another one each time."""
    begin = Task(prompts, 1, workload.temperature, workload.top_p, seed=0)
    names = list(contenders)
    for number in range(PREFILL, args.rounds):
        turn = max(number, 0) % len(names)
        for name in names[turn:] + names[:turn]:
            process, adaptive = contenders[name]
            task = begin
            if number != PREFILL:
                task = replace(begin, num_tokens=args.tokens, seed=number, adaptive=adaptive)
            found = ask(process, task)
            place = {"workload": asdict(workload), "contender": name, "round": number}
            append(records, {**place, **found})
            outcome = found.get("error", f"{found.get('seconds', 0):.1f} s")
            print(f"{workload.name}, {name}, round {number}: {outcome}", flush=True)


def ask(process: Started, task: Task) -> dict[str, object]:
    """An Answer's fields and whether nothing was kept before, or the error that came instead."""
    if isinstance(process, str):
        return {"error": process}
    try:
        answer = process.ask(task)
        return {**asdict(answer), "is_first": process.num_answers == 1}
    except ContenderFailed as error:
        return {"error": str(error)}


def close(started: Mapping[str, Started]) -> None:
    for process in started.values():
        if isinstance(process, ContenderProcess):
            process.close()


if __name__ == "__main__":
    main()
