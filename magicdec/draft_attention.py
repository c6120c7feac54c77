"""The attention of draft steps: one row a sequence over its view of the pages."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.draft_views import DraftViews
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.heads import Heads
from magicdec.kernels.sparse_attention import DraftView
from magicdec.kv_cache import PagedKVCache
from magicdec.sparse_kv import select_streaming

_PADDING = -1  # the position of a column that no row sees


@dataclass(frozen=True, slots=True)
class _Window:
    """The columns that a layer's KV heads share; layers alike in budget and window share it.

    column      0 .............. num_shared-1   | num_shared .. num_shared+draft_length-1
    holds       sink and recent, padded         | the round's own tokens, one a draft step
    """

    positions: torch.Tensor  # [batch, num_columns]
    slots: torch.Tensor  # [batch, num_shared]
    num_selected: tuple[int, ...]  # columns that each sequence's selection may add
    sliding_window: int | None


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """What layers alike in budget, window and KV heads read: selected columns, then the shared."""

    slots: torch.Tensor  # [len(layers), num_kv_heads, batch, num_columns - draft_length]
    layers: tuple[int, ...]  # those that have a selection; else none, and one view serves all
    num_selected: torch.Tensor  # [1, batch], or a row a layer where they differ
    window: _Window

    def index(self, layer: int) -> int:
        return self.layers.index(layer) if self.layers else 0


class DraftAttention:
    """The attention context of one round's draft steps.

    Each draft step appends its own rows to the view. Nothing is written to the pages: the verify
    pass computes those K/V again, in full.
    """

    def __init__(self, cache: PagedKVCache, backend: AttentionBackend, views: DraftViews) -> None:
        self._cache = cache
        self._backend = backend
        self._views = views
        self._windows: dict[tuple[bool, int | None], _Window] = {}
        self._columns: dict[tuple[bool, int | None, int], _Columns] = {}
        self._kernels: dict[int, DraftView] = {}
        self._masks: dict[_Columns, torch.Tensor] = {}
        self._step = -1
        self._device = cache.k[0].device

    @cached_property
    def _context_lens(self) -> torch.Tensor:
        """On the device, as the rest of what attend() needs: steps may be attended elsewhere."""
        return torch.tensor(self._views.layout.context_lens, device=self._device)

    @cached_property
    def _tables(self) -> NDArray[np.int64]:
        return self._views.layout.padded_tables()

    def begin_step(self, step: int) -> torch.Tensor:
        """Moves to draft step 0, 1, ...; returns the rows' absolute positions, [batch]."""
        self._step = step
        self._masks = {}
        return torch.tensor(self._views.layout.context_lens) + step

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
        columns = self._columns_of(layer, sliding_window)
        index, masks = columns.index(layer), self._mask(columns)
        if layer not in self._kernels:
            pages = self._cache.k[layer], self._cache.v[layer]
            slots = columns.slots[index]
            self._kernels[layer] = self._backend.view(*pages, slots, self._views.draft_length)
        mask = masks[index if len(masks) > 1 else 0]
        view = self._kernels[layer]
        return view.attend(*heads.rotated(), self._step, mask, scaling, softcap)

    def _columns_of(self, layer: int, sliding_window: int | None) -> _Columns:
        key = (self._is_first(layer), sliding_window, self._cache.k[layer].shape[0])
        if key not in self._columns:
            self._columns[key] = self._gather(layer, sliding_window)
        return self._columns[key]

    def _gather(self, layer: int, sliding_window: int | None) -> _Columns:
        """For all layers alike at once: layer by layer it would take as long as a draft step."""
        window, selections = self._shared(layer, sliding_window), self._views.selections
        num_kv_heads, num_slots = self._cache.k[layer].shape[:2]
        heads = torch.arange(num_kv_heads, device=self._device)[:, None, None] * num_slots
        shared = heads + window.slots
        selecting = [
            (i, selection, limit)
            for i, (selection, limit) in enumerate(
                zip(selections, window.num_selected, strict=True)
            )
            if limit > 0 and selection is not None
        ]
        if not selecting:
            none = torch.zeros(1, len(selections), dtype=torch.long, device=self._device)
            return _Columns(shared[None], (), none, window)
        layers = tuple(
            other
            for other in sorted(selecting[0][1].positions)
            if self._is_first(other) == self._is_first(layer)
            and self._cache.k[other].shape[0] == num_kv_heads
        )
        tables, size = self._views.layout.block_tables, self._views.layout.block_size
        chosen = [(i, s.slots(layers, tables[i], size)[:, :, :n]) for i, s, n in selecting]
        width = max(own.shape[2] for _, own in chosen)
        # What no sequence selects is hidden by the mask, yet read all the same.
        padding = heads.expand(len(layers), -1, len(selections), width)
        slots = torch.cat([padding, shared.expand(len(layers), -1, -1, -1)], dim=3)
        for i, own in chosen:
            slots[:, :, i, : own.shape[2]] = heads[:, 0] + own
        counts = np.zeros((len(layers), len(selections)), dtype=np.int64)
        for i, selection, limit in selecting:
            counts[:, i] = np.minimum(selection.counts(layers), limit)
        if (counts == counts[0]).all():
            counts = counts[:1]
        return _Columns(slots, layers, torch.from_numpy(counts).to(self._device), window)

    def _is_first(self, layer: int) -> bool:
        return layer < self._views.config.num_first_layers

    def _shared(self, layer: int, sliding_window: int | None) -> _Window:
        key = (self._is_first(layer), sliding_window)
        if key not in self._windows:
            self._windows[key] = self._window(layer, sliding_window)
        return self._windows[key]

    def _window(self, layer: int, sliding_window: int | None) -> _Window:
        """Sink and recent window of every sequence, and the room that its selection has."""
        num_window, num_selected = self._views.divide(layer)
        return self._pack(num_window, tuple(num_selected.tolist()), sliding_window)

    def _pack(
        self,
        num_window: NDArray[np.int64],  # [batch], keys of sink and recent window
        num_selected: tuple[int, ...],
        sliding_window: int | None,
    ) -> _Window:
        layout, num_sink = self._views.layout, self._views.config.num_sink_tokens
        size, starts = layout.block_size, np.array(layout.context_lens)
        shared, counts = select_streaming(starts, num_window, num_sink, sliding_window)
        is_there = np.arange(shared.shape[1]) < counts[:, None]
        shared[~is_there] = 0
        blocks = np.take_along_axis(self._tables, shared // size, axis=1)
        slots = np.where(is_there, blocks * size + shared % size, 0)
        own = starts[:, None] + np.arange(self._views.draft_length)
        positions = np.concatenate([np.where(is_there, shared, _PADDING), own], axis=1)
        on_device = [torch.from_numpy(array).to(self._device) for array in (positions, slots)]
        return _Window(on_device[0], on_device[1], num_selected, sliding_window)

    def _mask(self, columns: _Columns) -> torch.Tensor:
        """Additive [1 or len(layers), batch, num_columns]: -inf for padding, for columns not yet
        written, and beyond the window."""
        if columns not in self._masks:
            window = columns.window
            row = (self._context_lens + self._step)[:, None]
            visible = (window.positions >= 0) & (window.positions <= row)
            if window.sliding_window is not None:
                visible &= row - window.positions < window.sliding_window
            width = columns.slots.shape[3] - window.slots.shape[1]
            places = torch.arange(width, device=self._device)
            selected = places < columns.num_selected[:, :, None]
            shared = visible.expand(len(selected), -1, -1)
            visible = torch.cat([selected, shared], dim=2)
            mask = torch.zeros(visible.shape, dtype=self._cache.k[0].dtype, device=self._device)
            self._masks[columns] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[columns]
