"""CUDA graphs of a draft step: replayed once a drafted token, whatever its view lists.

    bucket    sequences of a graph, a power of two; one that is not there computes for nobody
    column    0 ........ width-1 | width .. width+MAX_STEPS-1
    holds     the view's slots   | the round's own tokens, a column a step

A round copies its views' slots and masks to where the graph reads them; a step copies its tokens.
The mask is that of the last step: a step sees its own tokens up to its own column.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from magicdec.attention import AttentionContext
from magicdec.draft_attention import DraftAttention, LayerColumns
from magicdec.graphs.capture import Capturer, KeptForward
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.sparse_attention import DeviceView
from magicdec.kv_cache import LayerSpec, PagedKVCache

logger = logging.getLogger(__name__)

MAX_STEPS = 8  # of a round whose steps are replayed
_WIDTH = 256  # a graph's columns are a multiple


class _GraphViews:
    """An attention context whose views, masks and step are at fixed places of the device."""

    def __init__(
        self,
        cache: PagedKVCache,
        backend: AttentionBackend,
        bucket: int,
        width: int,
        step: torch.Tensor,  # int32 [1]
    ) -> None:
        make_view = backend.view_on_device
        assert make_view is not None, f"{backend.name} reads its views on the host"
        device, num_layers = cache.k[0].device, len(cache.k)
        most_heads = max(len(k) for k in cache.k)
        shape = (num_layers, most_heads, bucket, width)
        self.slots = torch.zeros(shape, dtype=torch.int64, device=device)
        columns = (num_layers, bucket, width + MAX_STEPS)
        self.masks = torch.zeros(columns, dtype=cache.k[0].dtype, device=device)
        self._step = step
        self._views: list[DeviceView] = [
            make_view(k, v, slots[: len(k)], MAX_STEPS)
            for k, v, slots in zip(cache.k, cache.v, self.slots, strict=True)
        ]

    @property
    def static(self) -> list[torch.Tensor]:
        """All that a replay reads beside the pages and the step."""
        return [self.slots, self.masks, *(t for view in self._views for t in view.static)]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See AttentionContext."""
        view, mask = self._views[layer], self.masks[layer]
        return view.attend_at(query, key, value, self._step, mask, scaling, softcap)

    def load(self, columns: Sequence[LayerColumns]) -> None:
        """The round's views, all of its columns shown."""
        width = self.slots.shape[3]
        self.masks[:, :, :width] = float("-inf")
        for alike in columns:
            _, num_heads, batch, listed = alike.slots.shape
            for layers, index in _runs(alike.layers):
                slots, mask = (t if len(t) == 1 else t[index] for t in (alike.slots, alike.mask))
                self.slots[layers, :num_heads, :batch, :listed] = slots
                self.masks[layers, :batch, :listed] = mask[:, :, :listed]


@dataclass(frozen=True, slots=True)
class StaticDraftStep:
    """A draft step that reads fixed places: what a graph captures."""

    forward: KeptForward
    inputs: torch.Tensor  # int32 [2 * bucket + 1]: token ids, positions, the step
    views: _GraphViews

    def __call__(self) -> torch.Tensor:
        """Logits [bucket, vocab_size]."""
        bucket = len(self.inputs) // 2
        return self.forward(self.inputs[:bucket], self.inputs[bucket:-1], self.views)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    step: StaticDraftStep
    staging: torch.Tensor  # of its inputs, in pinned memory
    logits: torch.Tensor


class DraftRound:
    """The forward of one round's draft steps, called in their order."""

    def __init__(self, captured: _Captured) -> None:
        self._captured = captured
        self._step = 0

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionContext
    ) -> torch.Tensor:
        staging, batch = self._captured.staging, len(token_ids)
        bucket = len(staging) // 2
        staging[:batch] = token_ids
        staging[bucket : bucket + batch] = positions
        staging[-1] = self._step
        self._step += 1
        self._captured.step.inputs.copy_(staging, non_blocking=True)
        self._captured.graph.replay()
        return self._captured.logits[:batch].clone()


class DraftGraphs:
    """Of one model on one GPU. Windows move with a step, so a model that has any drafts without."""

    def __init__(
        self,
        forward: KeptForward,
        layers: tuple[LayerSpec, ...],
        cache: PagedKVCache,
        backend: AttentionBackend,
        capturer: Capturer,
    ) -> None:
        self._forward = forward
        self._has_windows = any(spec.sliding_window is not None for spec in layers)
        self._cache = cache
        self._backend = backend
        self._capturer = capturer
        self._captured: dict[tuple[int, int], _Captured] = {}

    def begin(self, attention: DraftAttention, batch: int, num_steps: int) -> DraftRound | None:
        """What runs the steps of a round; None: not by graphs."""
        if self._has_windows or num_steps > MAX_STEPS:
            return None
        attention.begin_step(num_steps - 1)
        columns = attention.columns()
        listed = max(alike.slots.shape[3] for alike in columns)
        shape = 1 << (batch - 1).bit_length(), max(-(-listed // _WIDTH), 1) * _WIDTH
        if shape not in self._captured:
            self._captured[shape] = self._capture(*shape)
        self._captured[shape].step.views.load(columns)
        return DraftRound(self._captured[shape])

    def static_step(self, bucket: int, width: int) -> StaticDraftStep:
        device = self._cache.k[0].device
        inputs = torch.zeros(2 * bucket + 1, dtype=torch.int32, device=device)
        views = _GraphViews(self._cache, self._backend, bucket, width, inputs[-1:])
        return StaticDraftStep(self._forward, inputs, views)

    def _capture(self, bucket: int, width: int) -> _Captured:
        step = self.static_step(bucket, width)
        graph, logits = self._capturer.capture(step)
        logger.info("captured a draft step of %d rows over %d columns", bucket, width)
        staging = torch.zeros(len(step.inputs), dtype=torch.int32).pin_memory()
        return _Captured(graph, step, staging, logits)


def _runs(layers: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Layers that follow on one another, and where they stand in the tuple."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[i - 1] + 1:
            yield slice(layers[first], layers[i - 1] + 1), slice(first, i)
            first = i
