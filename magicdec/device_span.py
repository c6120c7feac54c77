"""How long a device took over what it was given meanwhile, found without waiting for it."""

import time

import torch


class DeviceSpan:
    """Begins when it is made. Of a GPU the time is its own, between two events of its stream: the
    host may be far ahead of it. Elsewhere work is done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(torch.cuda.current_stream(device))
        self._started = self._ended = time.perf_counter()

    def end(self) -> None:
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """After end(). The host waits for the work in between, if it has not yet."""
        if self._events:
            started, ended = self._events
            ended.synchronize()
            return float(started.elapsed_time(ended)) / 1e3
        return self._ended - self._started
