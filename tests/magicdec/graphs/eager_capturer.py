"""Graphs without a GPU: what would be captured runs anew at each replay, as strictly."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from magicdec.graphs.capture import Capturer, Graph
from tests.magicdec.graphs.captured_region import CapturedRegion


class EagerCapturer(Capturer):
    """`static` are the weights and pages; each step names what else a replay finds again."""

    def __init__(self, device: torch.device, static: list[torch.Tensor] | None = None) -> None:
        super().__init__(device)
        self.static = static or []
        self.replays: Counter[str] = Counter()  # by the class of the step

    def staging(self, num_words: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_words, dtype=dtype)

    def capture(self, step: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        output = step().clone()
        return EagerGraph(self, step, output), output


class EagerGraph:
    def __init__(self, capturer: EagerCapturer, step: Any, output: torch.Tensor) -> None:
        self._capturer, self._step, self._output = capturer, step, output

    def replay(self) -> None:
        self._capturer.replays[type(self._step).__name__] += 1
        known = [*self._capturer.static, *self._step.static, self._output]
        with torch._C.DisableTorchFunction(), CapturedRegion(known):
            output = self._step()
            self._output.copy_(output)
