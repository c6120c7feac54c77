"""CUDA graphs of a draft step: replayed once a drafted token, whatever its view lists.

    bucket    sequences of a graph, a power of two; one that is not there computes for nobody
    column    0 ........ width-1 | width .. width+MAX_STEPS-1
    holds     the view's slots   | the round's own tokens, a column a step
    replay    forward -> scores over temperature -> argmax with noise -> the next step's inputs

A round describes its views (view_inputs.py), of which one launch lists slots and masks where the
graph reads them, and sends its rows once: a step chooses its own token and leaves it where the next
one reads, and all of them where verification does (drafts.py). Where choosing takes more than that
(draft_inputs.py) the host takes the logits, and copies its own choice there before the next step.
The round's own columns have no mask: a step sees them up to its own.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch

from magicdec.attention import AttentionContext
from magicdec.draft_views import DraftViews
from magicdec.drafts import AcceptedDrafts, DeviceTokens
from magicdec.graphs.capture import NUM_STAGINGS, Capturer, Graph, KeptForward
from magicdec.graphs.draft_inputs import DraftInputs
from magicdec.graphs.view_inputs import ViewInputs
from magicdec.kernels.dispatch import AttentionBackend, ChooseOnDevice
from magicdec.kernels.gumbel import scaled_scores
from magicdec.kernels.heads import Heads
from magicdec.kernels.sparse_attention import DeviceView
from magicdec.kernels.view_columns import ViewColumns
from magicdec.kv_cache import LayerSpec, PagedKVCache
from magicdec.sampler import SamplerRow
from magicdec.vocabulary import Vocabulary

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
        make_view, list_columns = backend.view_on_device, backend.columns_on_device
        assert make_view is not None, f"{backend.name} reads its views on the host"
        assert list_columns is not None, f"{backend.name} lists its views on the host"
        self._list_columns = list_columns
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
        heads: Heads,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See AttentionContext."""
        view, mask = self._views[layer], self.masks[layer]
        return view.attend_at(*heads.rotated(), self._step, mask, scaling, softcap)

    def fill(self, columns: ViewColumns) -> None:
        """The round's views, all of its own columns shown."""
        self._list_columns(self.slots, self.masks, columns)


@dataclass(frozen=True, slots=True)
class StaticDraftStep:
    """A draft step that reads and writes fixed places: what a graph captures."""

    forward: KeptForward
    choose: ChooseOnDevice
    vocabulary: Vocabulary  # that the logits are a rank's share of
    inputs: DraftInputs
    views: _GraphViews
    drafted: torch.Tensor  # int64 [MAX_STEPS, bucket]

    def __call__(self) -> torch.Tensor:
        """Logits [bucket, this rank's share]; the inputs are the next step's then."""
        inputs, vocabulary = self.inputs, self.vocabulary
        logits = self.forward(inputs.token_ids, inputs.positions, self.views)
        scores = logits.float()
        greatest = vocabulary.greatest(scores.amax(dim=1))
        scores = scaled_scores(scores, greatest, inputs.temperatures)
        winners = self.choose(scores, inputs.keys, vocabulary.start)
        chosen = vocabulary.best(winners).chosen()
        self.drafted.index_copy_(0, inputs.step.long(), chosen[None])
        inputs.advance(chosen)
        return logits

    @property
    def static(self) -> list[torch.Tensor]:
        """All that a replay finds again, beside weights and pages."""
        return [self.inputs.words, self.drafted, *self.views.static]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    step: StaticDraftStep
    stagings: Iterator[DraftInputs]  # on the host
    logits: torch.Tensor


class DraftRound:
    """One round's draft steps: all at once, or called one by one with tokens from the host."""

    def __init__(
        self,
        captured: _Captured,
        num_steps: int,
        chooses: bool,
        accepted: AcceptedDrafts | None,
    ) -> None:
        self._captured = captured
        self._num_steps = num_steps
        self._step = 0
        self._accepted = accepted
        self.chooses = chooses  # whether draft() may take the round's rows

    def draft(
        self,
        token_ids: list[int],  # a row's last token
        positions: list[int],
        last: list[int],  # where a row whose own draft is done stays
        rows: list[SamplerRow],  # the choices of the first step
    ) -> DeviceTokens:
        """One token a step and row. The host waits for none of them. After drafts that only the
        device has judged, all is as if none of them had been accepted."""
        captured, batch = self._captured, len(rows)
        inputs, staging = captured.step.inputs, next(captured.stagings)
        staging.write(token_ids, positions, last, rows)
        inputs.words.copy_(staging.words, non_blocking=True)
        if self._accepted is not None:
            inputs.move(self._accepted)
        for _ in range(self._num_steps):
            captured.graph.replay()
        return DeviceTokens(captured.step.drafted[: self._num_steps], batch)

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionContext
    ) -> torch.Tensor:
        """The next step's logits [batch, vocab_size]."""
        captured, batch = self._captured, len(token_ids)
        staging = next(captured.stagings)
        staging.write_step(self._step, token_ids, positions)
        self._step += 1
        captured.step.inputs.words.copy_(staging.words, non_blocking=True)
        captured.graph.replay()
        return captured.logits[:batch].clone()


class DraftGraphs:
    """Of one model on one GPU. Windows move with a step, so a model that has any drafts without."""

    def __init__(
        self,
        forward: KeptForward,
        layers: tuple[LayerSpec, ...],
        cache: PagedKVCache,
        backend: AttentionBackend,
        capturer: Capturer,
        max_model_len: int,
        may_choose: Callable[[list[SamplerRow]], bool],  # see VerificationRule.only_scales
        vocabulary: Vocabulary,  # that the forward's logits are a rank's share of
    ) -> None:
        self._forward = forward
        self._has_windows = any(spec.sliding_window is not None for spec in layers)
        self._cache = cache
        self._backend = backend
        self._capturer = capturer
        self._may_choose = may_choose
        self._vocabulary = vocabulary
        blocks = -(-(max_model_len + MAX_STEPS + 1) // cache.block_size)
        self._max_blocks = min(blocks, cache.num_blocks)
        self._view_inputs: dict[int, ViewInputs] = {}  # by bucket
        self._captured: dict[tuple[int, int], _Captured] = {}

    def begin(
        self,
        views: DraftViews,
        rows: list[SamplerRow],
        accepted: AcceptedDrafts | None = None,
    ) -> DraftRound | None:
        """What runs the steps of a round; None: not by graphs. `rows` are its first choices.

        With `accepted` it follows on drafts that the device has judged and the host has not seen:
        views and rows are as if none had been accepted, and contexts up to num_ahead longer.
        """
        if self._has_windows or views.draft_length > MAX_STEPS:
            return None
        bucket = 1 << (len(rows) - 1).bit_length()
        if bucket not in self._view_inputs:
            inputs = ViewInputs(self._cache, self._capturer, bucket, self._max_blocks)
            self._view_inputs[bucket] = inputs
        inputs = self._view_inputs[bucket]
        width = max(-(-inputs.write(views) // _WIDTH), 1) * _WIDTH
        if (bucket, width) not in self._captured:
            self._captured[bucket, width] = self._capture(bucket, width)
        captured = self._captured[bucket, width]
        columns = inputs.send(views)
        if accepted is not None:
            columns.sequences[: len(rows), 2].add_(accepted.counts)
        captured.step.views.fill(columns)
        return DraftRound(captured, views.draft_length, self._may_choose(rows), accepted)

    def static_step(self, bucket: int, width: int) -> StaticDraftStep:
        choose = self._backend.choose_on_device
        assert choose is not None, f"{self._backend.name} chooses on the host"
        device = self._cache.k[0].device
        size = DraftInputs.num_words(bucket)
        inputs = DraftInputs(torch.zeros(size, dtype=torch.int64, device=device))
        views = _GraphViews(self._cache, self._backend, bucket, width, inputs.step)
        drafted = torch.zeros(MAX_STEPS, bucket, dtype=torch.int64, device=device)
        return StaticDraftStep(self._forward, choose, self._vocabulary, inputs, views, drafted)

    def _capture(self, bucket: int, width: int) -> _Captured:
        step = self.static_step(bucket, width)
        graph, logits = self._capturer.capture(step)
        logger.info("captured a draft step of %d rows over %d columns", bucket, width)
        size = len(step.inputs.words)
        stagings = [self._capturer.staging(size, torch.int64) for _ in range(NUM_STAGINGS)]
        return _Captured(graph, step, cycle(map(DraftInputs, stagings)), logits)
