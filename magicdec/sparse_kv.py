"""What the draft may look at: logical positions of a sequence, mapped to slots once a round."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.sparse_attention import gather_view
from magicdec.kv_cache import PagedKVCache

_PADDING = -1  # the position of a column that no row sees


def select_streaming(
    context_len: int, num_keys: int, num_sink_tokens: int, sliding_window: int | None
) -> NDArray[np.int64]:
    """Sink and recent window (StreamingLLM, arXiv 2309.17453; MagicDec section 4).

    At most num_keys positions of 0..context_len-1, ascending. A sliding-window layer sees no sink,
    so its whole share goes to the most recent positions, up to its own window.
    """
    if sliding_window is not None and context_len >= sliding_window:
        return np.arange(max(context_len - min(num_keys, sliding_window), 0), context_len)
    if context_len <= num_keys:
        return np.arange(context_len)
    recent = np.arange(context_len - (num_keys - num_sink_tokens), context_len)
    return np.concatenate([np.arange(num_sink_tokens), recent])


@dataclass(frozen=True, slots=True)
class _View:
    """One selection, shared by every layer with the same window.

    column      0 ............ num_selected-1 | num_selected .. num_selected+draft_length-1
    holds       selected positions, padded    | the round's own tokens, one a draft step
    """

    positions: torch.Tensor  # [batch, num_columns]
    slots: torch.Tensor  # [batch, num_columns]
    sliding_window: int | None


class DraftAttention:
    """The attention context of one round's draft steps.

    The selected K/V are copied once into a compact view; each draft step appends its own rows to
    the copy. Nothing is written to the pages: the verify pass computes those K/V again, in full.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        layout: PagedLayout,  # context_lens: positions whose K/V are in the pages
        backend: AttentionBackend,
        draft_length: int,
        draft_budget: int,
        num_sink_tokens: int,
    ) -> None:
        self._cache = cache
        self._layout = layout
        self._backend = backend
        self._draft_length = draft_length
        self._num_keys = draft_budget - draft_length
        self._num_sink_tokens = num_sink_tokens
        self._views: dict[int | None, _View] = {}
        self._kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[int | None, torch.Tensor] = {}
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
        view = self._views.get(sliding_window)
        if view is None:
            view = self._views[sliding_window] = self._select(sliding_window)
        if layer not in self._kv:
            k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
            self._kv[layer] = gather_view(k_cache, view.slots), gather_view(v_cache, view.slots)
        k_view, v_view = self._kv[layer]
        column = k_view.shape[2] - self._draft_length + self._step
        k_view[:, :, column] = key
        v_view[:, :, column] = value
        mask = self._mask(view, k_view.dtype)
        narrow = query.to(k_view.dtype)  # the module may compute wider than the cache
        output = self._backend.gathered(narrow, k_view, v_view, mask, scaling, softcap)
        return output.to(query.dtype)

    def _select(self, sliding_window: int | None) -> _View:
        selected = [
            select_streaming(n, self._num_keys, self._num_sink_tokens, sliding_window)
            for n in self._layout.context_lens
        ]
        num_selected = max(len(s) for s in selected)
        shape = (len(selected), num_selected + self._draft_length)
        positions = np.full(shape, _PADDING, dtype=np.int64)
        slots = np.zeros(shape, dtype=np.int64)
        for i, chosen in enumerate(selected):
            table, size = self._layout.block_tables[i], self._layout.block_size
            positions[i, : len(chosen)] = chosen
            slots[i, : len(chosen)] = table[chosen // size] * size + chosen % size
            start = self._layout.context_lens[i]
            positions[i, num_selected:] = np.arange(start, start + self._draft_length)
        on_device = [torch.from_numpy(array).to(self._device) for array in (positions, slots)]
        return _View(on_device[0], on_device[1], sliding_window)

    def _mask(self, view: _View, dtype: torch.dtype) -> torch.Tensor:
        """Additive [batch, num_columns]: -inf for padding, for columns not yet written, and
        beyond the window."""
        if view.sliding_window not in self._masks:
            row = (self._context_lens + self._step)[:, None]
            visible = (view.positions >= 0) & (view.positions <= row)
            if view.sliding_window is not None:
                visible &= row - view.positions < view.sliding_window
            mask = torch.zeros(visible.shape, dtype=dtype, device=self._device)
            mask.masked_fill_(~visible, float("-inf"))
            self._masks[view.sliding_window] = mask
        return self._masks[view.sliding_window]
