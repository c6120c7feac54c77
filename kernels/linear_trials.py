"""What linears of few rows give on made-up rows, and what a linear takes: by it they are chosen."""

import logging
import statistics
import time
from collections.abc import Callable

import torch

from magicdec.kernels import reference

logger = logging.getLogger(__name__)

_NUM_TIMED = 5
_NUM_READS = 4  # of other memory: longer than a launch takes the host
_NUM_OUTPUTS, _NUM_INPUTS = 192, 512


def difference_of_linears(
    linear: Callable[..., torch.Tensor],  # as reference.linear
    gated_linear: Callable[..., torch.Tensor],  # as reference.gated_linear
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest from the reference, of 3, 20 and 40 rows: a linear with a bias and a residual,
    and a gated one. Infinite where it cannot run."""
    generator = torch.Generator().manual_seed(0)

    def made_up(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(device, dtype)

    weight, bias = made_up(_NUM_OUTPUTS, _NUM_INPUTS) / 4, made_up(_NUM_OUTPUTS)
    differences = []
    for num_rows in (3, 20, 40):
        rows, residual = made_up(num_rows, _NUM_INPUTS), made_up(num_rows, _NUM_OUTPUTS)
        summed = (rows, weight, bias, residual)
        try:
            pairs = [
                (linear(*summed), reference.linear(*summed)),
                (gated_linear(rows, weight), reference.gated_linear(rows, weight)),
            ]
        except Exception as error:  # a compiler's, or a GPU with too little shared memory
            logger.warning("linears of few rows cannot run here: %s", error)
            return float("inf")
        differences += [float((a.float() - b.float()).abs().max()) for a, b in pairs]
    return max(differences)


class ColdTimer:
    """Of one device; what is timed finds nothing of its weights in the device's cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache_bytes = 0
        if device.type == "cuda":
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.zeros(max(cache_bytes, 1), device=device)  # of four times its bytes

    def __call__(self, call: Callable[[], torch.Tensor]) -> float:
        """Seconds: a median, after one call that compiles."""
        call()
        once = self._on_gpu if self._device.type == "cuda" else self._on_host
        return statistics.median(once(call) for _ in range(_NUM_TIMED))

    def _on_gpu(self, call: Callable[[], torch.Tensor]) -> float:
        """The launch is made while the device reads other memory, so that only the device's time
        counts; what is read, not written, leaves nothing to write back."""
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_NUM_READS):
            self._other.amax()
        started.record()
        call()
        ended.record()
        torch.cuda.synchronize(self._device)
        milliseconds: float = started.elapsed_time(ended)
        return 1e-3 * milliseconds

    def _on_host(self, call: Callable[[], torch.Tensor]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
