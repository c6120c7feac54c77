"""The attention of draft steps: one row a sequence over its view of the pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.config import SelectionConfig
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.sparse_attention import DraftView
from magicdec.kv_cache import PagedKVCache
from magicdec.sparse_kv import Selection, layer_budget, select_streaming

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


@dataclass(frozen=True, slots=True)
class _Columns:
    """What layers alike in budget, window and KV heads read: selected columns, then the shared."""

    slots: torch.Tensor  # [len(layers), num_kv_heads, batch, num_columns - draft_length]
    layers: tuple[int, ...]  # those that have a selection; else none, and one view serves all
    window: _Window


@dataclass(frozen=True, slots=True)
class _View:
    """One layer's columns."""

    slots: torch.Tensor  # [num_kv_heads, batch, num_columns - draft_length]
    num_selected: tuple[int, ...]  # of each sequence, in this layer
    window: _Window


@dataclass(frozen=True, slots=True)
class DraftColumns:
    """What one layer's step reads."""

    slots: torch.Tensor  # [num_kv_heads, batch, num_columns - draft_length]
    mask: torch.Tensor  # additive [batch, num_columns]


class DraftAttention:
    """The attention context of one round's draft steps.

    Each draft step appends its own rows to the view. Nothing is written to the pages: the verify
    pass computes those K/V again, in full.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        layout: PagedLayout,  # context_lens: positions whose K/V are in the pages
        backend: AttentionBackend,
        config: SelectionConfig,
        draft_length: int,  # steps of the round
        draft_budgets: Sequence[int],  # a sequence
        selections: Sequence[Selection | None],  # a sequence; None: streaming
    ) -> None:
        self._cache = cache
        self._layout = layout
        self._backend = backend
        self._config = config
        self._draft_length = draft_length
        self._draft_budgets = draft_budgets
        self._selections = selections
        self._windows: dict[tuple[bool, int | None], _Window] = {}
        self._columns: dict[tuple[bool, int | None, int], _Columns] = {}
        self._views: dict[int, _View] = {}
        self._kernels: dict[int, DraftView] = {}
        self._masks: dict[tuple[int, int, tuple[int, ...]], torch.Tensor] = {}
        self._step = -1
        self._device = cache.k[0].device
        self._context_lens = torch.tensor(layout.context_lens, device=self._device)

    def begin_step(self, step: int) -> torch.Tensor:
        """Moves to draft step 0, 1, ...; returns the rows' absolute positions, [batch]."""
        self._step = step
        self._masks = {}
        return torch.tensor(self._layout.context_lens) + step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [num_query_heads, batch, head_dim]
        key: torch.Tensor,  # [num_kv_heads, batch, head_dim]
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See AttentionContext."""
        view = self._view(layer, sliding_window)
        if layer not in self._kernels:
            pages = self._cache.k[layer], self._cache.v[layer]
            self._kernels[layer] = self._backend.view(*pages, view.slots, self._draft_length)
        mask = self._mask(view)
        return self._kernels[layer].attend(query, key, value, self._step, mask, scaling, softcap)

    def columns(self, layer: int) -> DraftColumns:
        """Of a layer without a window, for whoever attends elsewhere."""
        view = self._view(layer, None)
        return DraftColumns(view.slots, self._mask(view))

    def _view(self, layer: int, sliding_window: int | None) -> _View:
        if layer not in self._views:
            self._views[layer] = self._new_view(layer, sliding_window)
        return self._views[layer]

    def _new_view(self, layer: int, sliding_window: int | None) -> _View:
        key = (self._is_first(layer), sliding_window, self._cache.k[layer].shape[0])
        if key not in self._columns:
            self._columns[key] = self._gather(layer, sliding_window)
        columns = self._columns[key]
        index = columns.layers.index(layer) if columns.layers else 0
        counts = tuple(
            min(limit, s.positions[layer].shape[1]) if limit and s is not None else 0
            for s, limit in zip(self._selections, columns.window.num_selected, strict=True)
        )
        return _View(columns.slots[index], counts, columns.window)

    def _gather(self, layer: int, sliding_window: int | None) -> _Columns:
        """For all layers alike at once: layer by layer it would take as long as a draft step."""
        window = self._shared(layer, sliding_window)
        num_kv_heads, num_slots = self._cache.k[layer].shape[:2]
        heads = torch.arange(num_kv_heads, device=self._device)[:, None, None] * num_slots
        shared = heads + window.slots
        selecting = [
            (i, selection, limit)
            for i, (selection, limit) in enumerate(
                zip(self._selections, window.num_selected, strict=True)
            )
            if limit > 0 and selection is not None
        ]
        if not selecting:
            return _Columns(shared[None], (), window)
        layers = tuple(
            other
            for other in selecting[0][1].positions
            if self._is_first(other) == self._is_first(layer)
            and self._cache.k[other].shape[0] == num_kv_heads
        )
        tables, size = self._layout.block_tables, self._layout.block_size
        chosen = [(i, s.slots(layers, tables[i], size)[:, :, :n]) for i, s, n in selecting]
        width = max(own.shape[2] for _, own in chosen)
        # What no sequence selects is hidden by the mask, yet read all the same.
        padding = heads.expand(len(layers), -1, len(self._selections), width)
        slots = torch.cat([padding, shared.expand(len(layers), -1, -1, -1)], dim=3)
        for i, own in chosen:
            slots[:, :, i, : own.shape[2]] = heads[:, 0] + own
        return _Columns(slots, layers, window)

    def _is_first(self, layer: int) -> bool:
        return layer < self._config.num_first_layers

    def _shared(self, layer: int, sliding_window: int | None) -> _Window:
        key = (self._is_first(layer), sliding_window)
        if key not in self._windows:
            self._windows[key] = self._window(layer, sliding_window)
        return self._windows[key]

    def _window(self, layer: int, sliding_window: int | None) -> _Window:
        """Sink and recent window of every sequence, and the room that its selection has."""
        shared: list[NDArray[np.int64]] = []
        num_selected: list[int] = []
        for context_len, draft_budget, selection in zip(
            self._layout.context_lens, self._draft_budgets, self._selections, strict=True
        ):
            num_keys = layer_budget(self._config, layer, draft_budget) - self._draft_length
            num_window = num_keys
            if selection is not None and layer in selection.positions and context_len > num_keys:
                num_recent = selection.num_recent(self._config, context_len, num_keys)
                num_window = self._config.num_sink_tokens + num_recent
            num_selected.append(max(num_keys - num_window, 0))
            sink = self._config.num_sink_tokens
            shared.append(select_streaming(context_len, num_window, sink, sliding_window))
        return self._pack(shared, tuple(num_selected), sliding_window)

    def _pack(
        self,
        shared: list[NDArray[np.int64]],
        num_selected: tuple[int, ...],
        sliding_window: int | None,
    ) -> _Window:
        num_shared = max(len(positions) for positions in shared)
        num_columns = num_shared + self._draft_length
        positions = np.full((len(shared), num_columns), _PADDING, dtype=np.int64)
        slots = np.zeros((len(shared), num_shared), dtype=np.int64)
        for i, chosen in enumerate(shared):
            table, size = self._layout.block_tables[i], self._layout.block_size
            positions[i, : len(chosen)] = chosen
            slots[i, : len(chosen)] = table[chosen // size] * size + chosen % size
            start = self._layout.context_lens[i]
            positions[i, num_shared:] = np.arange(start, start + self._draft_length)
        on_device = [torch.from_numpy(array).to(self._device) for array in (positions, slots)]
        return _Window(on_device[0], on_device[1], num_selected, sliding_window)

    def _mask(self, view: _View) -> torch.Tensor:
        """Additive [batch, num_columns]: -inf for padding, for columns not yet written, and
        beyond the window."""
        window = view.window
        num_selected = view.slots.shape[2] - window.slots.shape[1]
        key = (id(window), num_selected, view.num_selected)
        if key not in self._masks:
            row = (self._context_lens + self._step)[:, None]
            visible = (window.positions >= 0) & (window.positions <= row)
            if window.sliding_window is not None:
                visible &= row - window.positions < window.sliding_window
            columns = torch.arange(num_selected, device=self._device)
            counts = torch.tensor(view.num_selected, device=self._device)
            visible = torch.cat([columns < counts[:, None], visible], dim=1)
            mask = torch.zeros(visible.shape, dtype=self._cache.k[0].dtype, device=self._device)
            self._masks[key] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[key]
