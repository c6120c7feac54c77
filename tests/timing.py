"""Times that a busy machine does not make wrong: in units of other work, taken in turn with it."""

import time
from collections.abc import Callable

import numpy as np

_ROWS = np.linspace(0.0, 1.0, 4096)


def work_units(work: Callable[[], object], repeats: int = 60) -> float:
    """The least time of `work` over the least of a fixed job, some 100 microseconds of Python and
    numpy on one core of 2024. Both are slow where the machine is."""
    own, unit = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        done = time.perf_counter()
        _unit()
        unit.append(time.perf_counter() - done)
        own.append(done - started)
    return min(own) / min(unit)


def _unit() -> float:
    total = 0.0
    for i in range(1000):
        total += i * 0.5
    for _ in range(8):
        total += float(np.exp(_ROWS).sum())
    return total
