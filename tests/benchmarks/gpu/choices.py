"""Choosing a view's keys from their mass: the backend's kernel beside torch's top-k."""

from functools import partial
from typing import Any

import torch

from magicdec.kernels.dispatch import select_backend
from magicdec.kernels.selection import largest_indices
from tests.benchmarks.gpu.steps import seconds_of

# Layers and KV heads of one sequence of SmolLM2, of an 8B model, and of four such; its keys.
POINTS, TINY_POINTS = ((90, 7000), (256, 8192), (256, 32768), (1024, 32768)), ((4, 300),)
COUNTS = (512, 2048)


def choice_rows(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Microseconds, over mass that is skewed as attention's is."""
    largest = select_backend(device, torch.bfloat16).largest
    found = []
    for num_rows, num_keys in TINY_POINTS if tiny else POINTS:
        mass = (3 * torch.randn(num_rows, num_keys, device=device)).softmax(dim=1)
        for count in (64,) if tiny else COUNTS:
            row: dict[str, Any] = {"rows": num_rows, "keys": num_keys, "chosen": count}
            for name, choose in (("top-k, us", largest_indices), ("kernel, us", largest)):
                seconds = seconds_of(partial(choose, mass, count), device, times=10, repeats=4)
                row[name] = round(seconds * 1e6, 1)
            found.append(row)
    return found
