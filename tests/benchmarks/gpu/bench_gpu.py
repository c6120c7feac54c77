"""What one GPU does of the bytes it must read: attention, plain, draft and verify steps.

python -m tests.benchmarks.gpu.bench_gpu --out build/gpu          # some minutes, random weights
python -m tests.benchmarks.gpu.bench_gpu --model FOLDER --out build/gpu   # that model too
python -m tests.benchmarks.gpu.bench_gpu --tiny --out build/gpu   # on a CPU too: does it run at all

Needs torch, triton, transformers and numpy; matplotlib for --plot. A step's time is from its inputs
on the host to its tokens there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.fused_modules import fuse_modules
from magicdec.kernels.dispatch import select_backend
from magicdec.kernels.layer_dispatch import select_elementwise
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.model_loader import LoadedModel, describe_model
from tests.benchmarks.gpu.choices import choice_rows
from tests.benchmarks.gpu.end_to_end import end_to_end_rows
from tests.benchmarks.gpu.rounds import round_rows
from tests.benchmarks.gpu.steps import Steps, read_bandwidth, seconds_of

BLOCK_SIZE = 64
DRAFT_LENGTH, DRAFT_BUDGET = 4, 512
POINTS = ((1, 8192), (8, 8192), (32, 4096), (8, 32768))
ROUND_POINTS = POINTS[:3]
ATTENTION_POINTS = ((8, 8192), (8, 32768), (1, 32768), (1, 131072))
TINY_POINTS = ((2, 300),)
END_TO_END_POINTS, END_TO_END_ROUNDS = ((8, 4096), (32, 4096), (32, 7000)), 24
TINY_BUDGET, TINY_ROUNDS = 96, 6
COLUMNS = {
    "model": "model",
    "batch": "batch",
    "context": "context",
    "plain eager": "plain_eager_ms",
    "plain": "plain_ms",
    "over floor": "plain_over_floor",
    "draft step": "draft_ms",
    "over its floor": "draft_over_floor",
    "verify of 5 rows": "verify_ms",
    "over plain": "verify_over_plain",
    "views of a round": "views_ms",
    "plain and a chunk, packed": "packed_ms",
    "chunk launched beside": "mixed_ms",
    "plain round": "plain_round_ms",
    "over its step": "host_ms",
    "round of 4 drafts": "drafted_round_ms",
}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    bandwidth = read_bandwidth(device, 1 << (20 if args.tiny else 32))
    record: dict[str, Any] = {"machine": describe(device), "read_gb_s": bandwidth / 1e9}
    print(f"{record['machine']}: reads {bandwidth / 1e9:.0f} GB/s")
    record["attention"] = attention_rows(device, bandwidth, args.tiny)
    print_table(record["attention"], {key: key for key in record["attention"][0]})
    record["choices"] = choice_rows(device, args.tiny)
    print_table(record["choices"], {key: key for key in record["choices"][0]})
    record["steps"] = []
    for name, config in shapes(args.tiny).items():
        record["steps"] += step_rows(name, config, device, bandwidth, args.tiny)
    print_table(record["steps"], COLUMNS)
    if args.model is not None:
        rounds = TINY_ROUNDS if args.tiny else END_TO_END_ROUNDS
        points = TINY_POINTS if args.tiny else END_TO_END_POINTS
        draft = (DRAFT_LENGTH, TINY_BUDGET if args.tiny else DRAFT_BUDGET)
        record["end to end"] = end_to_end_rows(args.model, points, draft, rounds)
        print_table(record["end to end"], {key: key for key in record["end to end"][0]})
    (args.out / "gpu.json").write_text(json.dumps(record, indent=1))
    if args.plot:
        plot(record, args.out / "gpu.png")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """None: the command line's."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, for gpu.json")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, to decode real text")
    parser.add_argument("--tiny", action="store_true", help="one small point of small models")
    parser.add_argument("--plot", action="store_true", help="gpu.png beside it")
    args = parser.parse_args(arguments)
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny runs on a CPU")
    return args


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


def shapes(tiny: bool) -> dict[str, PretrainedConfig]:
    """As their publishers' config.json have them, but for the weights."""
    if tiny:
        small: dict[str, Any] = {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        }
        return {"tiny Llama": LlamaConfig(**small), "tiny Qwen3": Qwen3Config(**small)}
    grouped: dict[str, Any] = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    }
    llama = {**grouped, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    qwen = {**grouped, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    return {"Llama-3.1-8B": LlamaConfig(**llama), "Qwen3-8B": Qwen3Config(**qwen)}


def attention_rows(device: torch.device, bandwidth: float, tiny: bool) -> list[dict[str, Any]]:
    """Of one layer of 32 query and 8 KV heads of 128."""
    dtype = torch.bfloat16
    backend = select_backend(device, dtype)
    found = []
    for batch, context in TINY_POINTS if tiny else ATTENTION_POINTS:
        for num_rows in (1, 5):
            layout, num_blocks = scattered(batch, context, num_rows)
            query = torch.randn(32, num_rows * batch, 128, device=device, dtype=dtype)
            shape = (2, 8, num_blocks * BLOCK_SIZE, 128)
            k_cache, v_cache = torch.randn(shape, device=device, dtype=dtype)
            attend = backend.paged

            def run(
                case: tuple[Any, ...] = (query, k_cache, v_cache, layout, 128**-0.5),
                attend: Any = attend,
            ) -> torch.Tensor:
                output: torch.Tensor = attend(*case)
                return output

            seconds = seconds_of(run, device, times=10, repeats=1 if tiny else 4)
            kv_bytes = batch * context * 8 * 128 * 2 * dtype.itemsize
            found.append(
                {
                    "batch": batch,
                    "context": context,
                    "rows": num_rows,
                    "us": round(seconds * 1e6, 1),
                    "of read bandwidth": round(kv_bytes / seconds / bandwidth, 3),
                }
            )
    return found


def scattered(batch: int, context: int, num_rows: int) -> tuple[PagedLayout, int]:
    """Sequences whose blocks lie anywhere."""
    blocks = -(-(context + num_rows) // BLOCK_SIZE)
    order = np.random.default_rng(0).permutation(batch * blocks)
    tables = tuple(np.split(order, batch))
    return PagedLayout((num_rows,) * batch, (context,) * batch, tables, BLOCK_SIZE), batch * blocks


def step_rows(
    name: str, config: PretrainedConfig, device: torch.device, bandwidth: float, tiny: bool
) -> list[dict[str, Any]]:
    model = load(config, device)
    found = []
    for batch, context in TINY_POINTS if tiny else POINTS:
        steps = Steps(model, batch, context, BLOCK_SIZE, DRAFT_LENGTH, DRAFT_BUDGET)
        times = steps.measure(num_rounds=3 if tiny else 12)
        floors = {
            "plain": steps.floor_bytes(context) / bandwidth,
            "draft": steps.floor_bytes(min(DRAFT_BUDGET, context)) / bandwidth,
        }
        found.append({"model": name, "batch": batch, "context": context, **row_of(times, floors)})
        del steps
    points, num_rounds = (TINY_POINTS, TINY_ROUNDS) if tiny else (ROUND_POINTS, 24)
    draft = (DRAFT_LENGTH, TINY_BUDGET if tiny else DRAFT_BUDGET)
    rounds = round_rows(model, config, points, draft, BLOCK_SIZE, num_rounds)
    for row, beside in zip(rounds, found, strict=False):  # of the first points
        step = beside.get("plain_ms", beside["plain_eager_ms"])
        beside.update(row, host_ms=round(row["plain_round_ms"] - step, 2))
    return found


def row_of(times: dict[str, list[float]], floors: dict[str, float]) -> dict[str, float]:
    middle = {key: statistics.median(values) for key, values in times.items() if values}
    row = {f"{key}_ms": round(seconds * 1e3, 2) for key, seconds in middle.items()}
    plain = middle.get("plain", middle["plain_eager"])
    row["plain_over_floor"] = round(plain / floors["plain"], 3)
    row["draft_over_floor"] = round(middle["draft"] / floors["draft"], 3)
    row["verify_over_plain"] = round(middle["verify"] / plain, 3)
    return row


def load(config: PretrainedConfig, device: torch.device) -> LoadedModel:
    started = time.perf_counter()
    with device:
        torch.set_default_dtype(torch.bfloat16)
        module: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        torch.set_default_dtype(torch.float32)
    kernels = select_elementwise(device, torch.bfloat16)
    if kernels is not None:
        fuse_modules(module, kernels)
    print(f"random weights in {time.perf_counter() - started:.0f} s")
    return describe_model(module, "bfloat16")


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    print("\n| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in columns.values()) + " |")


def plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = record["attention"]
    names = [
        f"{r['batch']} x {r['context']:,}, {r['rows']} row{'s' * (r['rows'] > 1)}" for r in rows
    ]
    left.barh(names, [r["of read bandwidth"] for r in rows])
    left.axvline(0.85, color="black", linestyle=":")
    left.set_xlabel("attention's share of the read bandwidth")
    steps = record["steps"]
    places = np.arange(len(steps))
    kinds: dict[str, Callable[[dict[str, Any]], float]] = {
        "plain": lambda r: float(r["plain_over_floor"]),
        "draft step": lambda r: float(r["draft_over_floor"]),
        "verify of 5 rows, over plain": lambda r: float(r["verify_over_plain"]),
    }
    for i, (name, value) in enumerate(kinds.items()):
        right.barh(places + 0.27 * (i - 1), [value(r) for r in steps], height=0.25, label=name)
    right.set_yticks(places, [f"{r['model']}, {r['batch']} x {r['context']:,}" for r in steps])
    right.axvline(1.0, color="black", linestyle=":")
    right.set_xlabel("time over that of its bytes")
    figure.legend(loc="outside lower right", ncols=3, fontsize=8)
    figure.suptitle(record["machine"], fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
