"""What a rank runs on and the rates it sustains there: the figures behind a roofline."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from magicdec.roofline import Device

# Larger than caches, and small beside a KV pool that may have left little memory.
_COPY_BYTES = 128 << 20  # source and target each
_MATRIX_SIZE = {"cpu": 1024, "cuda": 4096}
_SECONDS = 0.05  # a rate is measured so long
_LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class RankDevice:
    """One rank's accelerator or CPU, as its own process measures it."""

    name: str
    num_threads: int  # torch's, which is what counts on a CPU
    weight_element_bytes: int  # of the linears, as they are read
    rates: Device


def measure_device(
    device: torch.device, dtype: torch.dtype, weight_element_bytes: int
) -> RankDevice:
    """Bandwidth by a copy, arithmetic by a matrix product in `dtype`: a fraction of a second.

    `rates.fixed_seconds` is 0: what a forward costs beside both only forwards can tell.
    """
    rates = Device(
        bandwidth=_copy_bandwidth(device),
        arithmetic=_product_rate(device, dtype),
        memory_bytes=_memory_bytes(device),
        fixed_seconds=0.0,
    )
    return RankDevice(device_name(device), torch.get_num_threads(), weight_element_bytes, rates)


@torch.inference_mode()
def _copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, those read and those written together."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * _COPY_BYTES / _least_seconds(lambda: target.copy_(source), device)


@torch.inference_mode()
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATRIX_SIZE[device.type]
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(left)
    return 2.0 * size**3 / _least_seconds(lambda: torch.mm(left, right, out=product), device)


def _least_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Of several runs after a first one: what disturbs a run only makes it longer."""
    _timed(work, device)
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or sum(seconds) < _SECONDS:
        seconds.append(_timed(work, device))
    return min(seconds)


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as its system tells it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
