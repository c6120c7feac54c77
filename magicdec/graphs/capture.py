"""Capturing what reads fixed places of a GPU, and nothing on the host."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from magicdec.attention import AttentionContext

_WARM_UPS = 2  # what a first call compiles or allocates is not of a graph
# Places that a round's inputs are written to on the host, in turn. Between two waits they are sent
# twice at most: for the round itself, and for what it begins of the next. After a wait all has been
# read that was sent before it but for the last, so of three the one whose turn it is has been.
NUM_STAGINGS = 3


class KeptForward(Protocol):
    """See LoadedModel.forward."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionContext,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None: ...


class Capturer:
    """Of one GPU; graphs share the memory that they need between their inputs and outputs, so each
    one's output must be read before another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def staging(self, num_words: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the host, from which a copy to the device waits for nothing: [num_words]."""
        return torch.zeros(num_words, dtype=dtype).pin_memory()

    def capture(self, step: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """The graph and its output. Whoever replays it keeps `step` alive, and what that reads."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of this thread: NCCL's own looks after its collectives meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        self._pool = graph.pool()
        return graph, output
