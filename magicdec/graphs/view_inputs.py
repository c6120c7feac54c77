"""A round's draft views as the host describes them: one buffer, sent in one copy.

    sequences, layers   see ViewColumns
    block_tables        of the sequences that there are, end to end; no more is sent than that

The columns themselves are listed on the device.
"""

from itertools import cycle

import numpy as np
import torch

from magicdec.draft_views import DraftViews
from magicdec.graphs.capture import NUM_STAGINGS, Capturer
from magicdec.kernels.view_columns import ViewColumns
from magicdec.kv_cache import PagedKVCache
from magicdec.sparse_kv import PackedSelection

_SEQUENCE_WORDS = 5
_LAYER_WORDS = 2  # of four int32


class ViewInputs:
    """Of a bucket of sequences. What is written must be sent before more is."""

    def __init__(
        self,
        cache: PagedKVCache,
        capturer: Capturer,
        bucket: int,
        max_blocks: int,  # of a sequence
    ) -> None:
        num_layers, device = len(cache.k), cache.k[0].device
        self._cache = cache
        num_words = bucket * (_SEQUENCE_WORDS + _LAYER_WORDS * num_layers + -(-max_blocks // 2))
        self.words = torch.zeros(num_words, dtype=torch.int64, device=device)
        self._fixed = bucket * (_SEQUENCE_WORDS + _LAYER_WORDS * num_layers)
        self._on_device = _sections(self.words, bucket, num_layers)
        stagings = [capturer.staging(num_words, torch.int64) for _ in range(NUM_STAGINGS)]
        self._stagings = cycle([(own, _sections(own, bucket, num_layers)) for own in stagings])
        self._none = PackedSelection(self.words[:0], PackedSelection.no_places(num_layers))

    def write(self, views: DraftViews) -> int:
        """The most columns that one of the layers and sequences lists."""
        layout, batch, num_layers = views.layout, len(views.selections), len(self._cache.k)
        held = [self._none if s is None else s.packed(num_layers) for s in views.selections]
        self._staging, sections = next(self._stagings)
        sequences, layers, tables = (section.numpy() for section in sections)
        sequences[batch:], layers[batch:] = 0, 0
        lengths = np.array([len(table) for table in layout.block_tables])
        columns = sequences[:batch].T
        columns[0] = [selection.positions.data_ptr() for selection in held]
        columns[1] = [len(selection.positions) for selection in held]
        columns[2] = layout.context_lens
        columns[3] = np.cumsum(lengths) - lengths
        columns[4] = [0 if s is None else s.observed_len for s in views.selections]
        places = np.concatenate([s.places for s in held]).reshape(batch, num_layers, 3)
        layers[:batch, :, 0], layers[:batch, :, 2:] = places[:, :, 2], places[:, :, :2]
        num_first, widest = min(views.config.num_first_layers, num_layers), 0
        for start, stop in ((0, num_first), (num_first, num_layers)):
            if start == stop:
                continue
            layers[:batch, start:stop, 1] = views.num_keys(start)[:, None]
            most = places[:, start:stop, 2].max(axis=1)
            widest = max(widest, views.most_columns(start, most))
        num_blocks = int(lengths.sum())
        np.concatenate(layout.block_tables, out=tables[:num_blocks], casting="same_kind")
        self._num_words = self._fixed + -(-num_blocks // 2)
        self._selected = tuple(selection.positions for selection in held)
        return widest

    def send(self, views: DraftViews) -> ViewColumns:
        """What write() described."""
        self.words[: self._num_words].copy_(self._staging[: self._num_words], non_blocking=True)
        return ViewColumns(
            *self._on_device,
            selected=self._selected,
            num_sink_tokens=views.config.num_sink_tokens,
            num_recent_tokens=views.config.num_recent_tokens,
            num_slots=self._cache.k[0].shape[1],
            block_size=self._cache.block_size,
        )


def _sections(
    words: torch.Tensor, bucket: int, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = [bucket * _SEQUENCE_WORDS, bucket * num_layers * _LAYER_WORDS]
    sequences, layers, tables = words.split_with_sizes([*sizes, len(words) - sum(sizes)])
    return (
        sequences.view(bucket, _SEQUENCE_WORDS),
        layers.view(torch.int32).view(bucket, num_layers, 2 * _LAYER_WORDS),
        tables.view(torch.int32),
    )
