"""Attention over pages against the rate at which this machine reads memory.

python -m tests.benchmarks.bench_attention --threads 2

Shapes and row counts take turns, so that a machine whose speed drifts slows all of them.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils import cpp_extension

from magicdec.kernels.dispatch import AttentionBackend, select_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import LayerSpec, PagedKVCache
from magicdec.profiling.device_rates import device_name

_BLOCK_SIZE = 64
_ROWS = (1, 3, 5, 17)  # of a sequence
_READ_BYTES = 1 << 30
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@dataclass(frozen=True, slots=True)
class Shape:
    batch_size: int
    context_len: int
    num_kv_heads: int
    group_size: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Of one layer, in two bytes an element."""
        return 4 * self.batch_size * self.context_len * self.num_kv_heads * self.head_dim


SHAPES = (
    Shape(1, 7000, 3, 3, 64),
    Shape(8, 4000, 3, 3, 64),
    Shape(8, 7000, 3, 3, 64),
    Shape(8, 8000, 8, 4, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend = select_backend(torch.device("cpu"), torch.bfloat16)
    read = compiled_read(args.threads)
    name = device_name(torch.device("cpu"))
    print(f"{name}, {args.threads} threads, bfloat16, attention {backend.name}\n")
    print(
        "| batch x context, KV heads x dims, group | rows | ms | GB/s | of a read | over one row |"
    )
    print("| --- " * 6 + "|")
    for shape in SHAPES:
        report(shape, measure(backend, shape, args.repeats), read)


def measure(backend: AttentionBackend, shape: Shape, repeats: int) -> dict[int, list[float]]:
    """Seconds by rows a sequence."""
    layer = LayerSpec(
        shape.num_kv_heads * shape.group_size, shape.num_kv_heads, shape.head_dim, None
    )
    blocks = -(-(shape.context_len + max(_ROWS)) // _BLOCK_SIZE)
    device = torch.device("cpu")
    cache = PagedKVCache((layer,), _BLOCK_SIZE, shape.batch_size * blocks, torch.bfloat16, device)
    for pages in (cache.k[0], cache.v[0]):
        pages.copy_(torch.randn(pages.shape))
    tables = tuple(np.arange(i * blocks, (i + 1) * blocks) for i in range(shape.batch_size))
    contexts = (shape.context_len,) * shape.batch_size
    found: dict[int, list[float]] = {rows: [] for rows in _ROWS}
    layouts = {  # one serves all layers of a step
        rows: PagedLayout((rows,) * shape.batch_size, contexts, tables, _BLOCK_SIZE)
        for rows in _ROWS
    }
    for _ in range(repeats + 1):
        for rows, seconds in found.items():
            query = torch.randn(
                layer.num_query_heads, rows * shape.batch_size, shape.head_dim
            ).bfloat16()
            begun = time.perf_counter()
            backend.paged(query, cache.k[0], cache.v[0], layouts[rows], shape.head_dim**-0.5)
            seconds.append(time.perf_counter() - begun)
    return {rows: seconds[1:] for rows, seconds in found.items()}  # the first one warms up


def report(shape: Shape, found: dict[int, list[float]], read: Callable[[], float]) -> None:
    ceiling = max(read() for _ in range(5))
    name = (
        f"{shape.batch_size} x {shape.context_len:,}, {shape.num_kv_heads} x {shape.head_dim}, "
        f"{shape.group_size}"
    )
    one = statistics.median(found[1])
    for rows, seconds in found.items():
        middle = statistics.median(seconds)
        rate = shape.kv_bytes / middle
        print(
            f"| {name} | {rows} | {middle * 1e3:.2f} [{min(seconds) * 1e3:.2f} .. "
            f"{max(seconds) * 1e3:.2f}] | {rate / 1e9:.1f} | {rate / ceiling:.2f} "
            f"| {middle / one:.2f} |",
            flush=True,
        )


def compiled_read(num_threads: int) -> Callable[[], float]:
    """Bytes a second of one reading of 1 GiB."""
    source = Path(__file__).with_name("read_bandwidth.cpp")
    compiler = str(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_bandwidth.so"
        subprocess.run([compiler, *_FLAGS, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    data = torch.randint(0, 1 << 30, (_READ_BYTES // 8,))

    def read() -> float:
        begun = time.perf_counter()
        function(data.data_ptr(), _READ_BYTES, num_threads)
        return _READ_BYTES / (time.perf_counter() - begun)

    return read


if __name__ == "__main__":
    main()
