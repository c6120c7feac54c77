"""How the contenders are started: the same model, dtype, threads and room for K/V."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.peers.contender import Spec
from tests.benchmarks.peers.workloads import Workload

ENGINE = "magicdec"  # one process: plain and adaptive
HTTP = "magicdec over HTTP"
BASELINE = "vllm"
_MODULES = "tests.benchmarks.peers"
_BLOCK = 64
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a run, for all contenders."""

    model: str  # folder
    dtype: str
    threads: int
    num_tokens: int  # of an answer
    kv_bytes_per_token: int
    peers_python: str  # of the environment that has vLLM
    port: int  # of the HTTP contender


def engine_specs(settings: Settings, workloads: Sequence[Workload]) -> list[Spec]:
    """Those that decode in their own process."""
    most_rows = max(w.batch_size for w in workloads)
    longest = max(w.context_len for w in workloads) + settings.num_tokens + _BLOCK
    threads = {"OMP_NUM_THREADS": str(settings.threads)}
    model = ("--model", settings.model, "--dtype", settings.dtype)
    vllm: tuple[str, ...] = (settings.peers_python, "-m", f"{_MODULES}.vllm_contender", *model)
    vllm += ("--max-model-len", str(longest), "--max-num-seqs", str(most_rows))
    # Unbound threads: vLLM would take a core of each node for itself.
    its_settings = {
        **threads,
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib(settings, workloads)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    theirs = (sys.executable, "-m", f"{_MODULES}.transformers_contender", *model)
    own: tuple[str, ...] = (sys.executable, "-m", f"{_MODULES}.magicdec_contender", *model)
    own += ("--kv-tokens", str(kv_tokens(settings, workloads)), "--max-num-seqs", str(most_rows))
    return [
        Spec(BASELINE, vllm, its_settings),
        Spec("vllm n-gram", (*vllm, "--ngram"), its_settings),
        Spec("transformers", theirs, threads),
        Spec(ENGINE, own, threads),
    ]


def http_spec(settings: Settings, workloads: Sequence[Workload]) -> Spec:
    command: tuple[str, ...] = (
        sys.executable,
        "-m",
        f"{_MODULES}.http_contender",
        "--model",
        settings.model,
    )
    command += ("--dtype", settings.dtype, "--port", str(settings.port))
    command += ("--threads", str(settings.threads))
    command += ("--kv-cache-gib", str(kv_gib(settings, workloads)))
    return Spec(HTTP, command, stops=False)


def kv_tokens(settings: Settings, workloads: Sequence[Workload]) -> int:
    """Prompts, answers and a draft's lookahead of the largest workload."""
    return max(w.batch_size * (w.context_len + settings.num_tokens + 2 * _BLOCK) for w in workloads)


def kv_gib(settings: Settings, workloads: Sequence[Workload]) -> int:
    return -(-kv_tokens(settings, workloads) * settings.kv_bytes_per_token // _GIB)
