"""What the served application costs over the bare engine: start-up, memory, and time a round.

python -m tests.benchmarks.bench_serving                  start-up and memory, the embedded model
python -m tests.benchmarks.bench_serving --model random   time a round, small enough to see it

Starts `magicdec serve` and times it to the first answer. Then the same prompts
decode at the same batch on a bare engine in this process and through HTTP, interleaved; the server
idles while the bare engine runs. A round is one verify pass of the whole batch. With fewer threads
than cores the difference is the Ray layer's own latency; with all of them it is also the CPU time
that Ray's processes and this client take from the engine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from magicdec.batch import Plan
from magicdec.config import CacheConfig, EngineConfig, ModelConfig
from magicdec.control.round_policy import FixedPolicy
from magicdec.deployments.bench_text import read_text
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import Request, SamplingParams
from tests.benchmarks.bench_decode import spread
from tests.benchmarks.peers.http_contender import healthy

PORT = 8179
MODEL_NAME = "benched"
GIB = 1 << 30


def main() -> None:
    args = parse_arguments()
    folder = tempfile.TemporaryDirectory()
    path = save_random_model(folder.name) if args.model == "random" else resolve_model(args.model)
    tokenizer = load_tokenizer(path)
    ids = tokenizer(read_text(None))["input_ids"]
    prompts = [ids[i * args.context : (i + 1) * args.context] for i in range(args.batch)]
    config = EngineConfig(ModelConfig(path), CacheConfig(kv_cache_bytes=args.kv_cache_gib * GIB))
    with folder, served(args, path) as server:
        report_memory(server, config)
        engine = Engine(config, LocalExecutor(config), tokenizer, read_model_facts(path))
        torch.set_num_threads(args.threads)
        print(f"batch {args.batch} x {args.context}, {args.threads} threads of {os.cpu_count()}")
        measure(engine, prompts, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME, help="or 'random': 4 small layers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64, help="generated, a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved pairs")
    parser.add_argument("--draft-length", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max((os.cpu_count() or 2) - 1, 1))
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    return parser.parse_args()


def save_random_model(folder: str) -> str:
    """A Llama of 4 layers with the embedded model's tokenizer: a round of a few milliseconds."""
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL_NAME))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def served(args: argparse.Namespace, path: str) -> Iterator[psutil.Process]:
    """`magicdec serve`, from the command to the first 200 of /health and of an answer."""
    command = [sys.executable, "-m", "magicdec.deployments.cli", "serve", "--port", str(PORT)]
    command += ["--model", path, "--served-name", MODEL_NAME]
    command += ["--draft-length", str(args.draft_length)]
    command += ["--kv-cache-gib", str(args.kv_cache_gib), "--num-threads", str(args.threads)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not healthy(PORT):
            if process.poll() is not None:
                raise SystemExit(f"magicdec serve ended with {process.returncode}")
            time.sleep(0.1)
        complete([[1, 2, 3]], 1)
        print(f"start to the first answer: {time.perf_counter() - started:.1f} s")
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def report_memory(server: psutil.Process, config: EngineConfig) -> None:
    """PSS of every process of the application, against the KV pool it holds."""
    processes = [server, *server.children(recursive=True)]
    pss = sum(p.memory_full_info().pss for p in processes)
    pool = config.cache.pool_bytes
    print(
        f"PSS of {len(processes)} processes: {pss / GIB:.2f} GiB, of which KV pool "
        f"{pool / GIB:.2f} GiB: {(pss - pool) / GIB:.2f} GiB for the model and the rest"
    )


def measure(engine: Engine, prompts: list[list[int]], args: argparse.Namespace) -> None:
    bare, through_http = [], []
    for pair in range(args.rounds + 1):
        engine_ms = bare_round_ms(engine, prompts, args)
        http_ms = http_round_ms(prompts, args.tokens)
        print(f"  pair {pair}: bare {engine_ms:.1f} ms a round, served {http_ms:.1f} ms a round")
        if pair > 0:  # the first pair warms up
            bare.append(engine_ms)
            through_http.append(http_ms)
    added = [s - b for b, s in zip(bare, through_http, strict=True)]
    print(f"bare    median {statistics.median(bare):6.1f} ms a round {spread(bare)}")
    print(
        f"served  median {statistics.median(through_http):6.1f} ms a round {spread(through_http)}"
    )
    print(f"added   median {statistics.median(added):6.1f} ms a round {spread(added)}")


def bare_round_ms(engine: Engine, prompts: list[list[int]], args: argparse.Namespace) -> float:
    """Milliseconds a round while every sequence decodes."""
    engine.policy = FixedPolicy(Plan("recycled", args.draft_length, 512))
    sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), sampling))
    times: list[float] = []
    while engine.has_unfinished():
        started = time.perf_counter()
        outputs = engine.step()
        decoding = all(o.usage.num_rounds > 0 for o in outputs)
        if len(outputs) == len(prompts) and decoding:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.mean(times)


def http_round_ms(prompts: list[list[int]], num_tokens: int) -> float:
    """Milliseconds between a client's events while all clients receive some."""
    arrivals: list[list[float]] = [[] for _ in prompts]
    threads = [
        threading.Thread(target=complete, args=([prompt], num_tokens, arrivals[i]))
        for i, prompt in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    inside = [[t for t in times if begin <= t <= end] for times in arrivals]
    gaps = [(times[-1] - times[0]) / (len(times) - 1) for times in inside if len(times) > 1]
    return statistics.median(gaps) * 1e3


def complete(
    prompts: list[list[int]], num_tokens: int, arrivals: list[float] | None = None
) -> None:
    """One streamed completion; notes when each event that carries tokens arrived."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompts,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    url = f"http://127.0.0.1:{PORT}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=600) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            if arrivals is not None and line.startswith("data: {") and json.loads(line[6:]):
                arrivals.append(time.perf_counter())


if __name__ == "__main__":
    main()
