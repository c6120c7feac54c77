"""What the draft may look at: logical positions of a sequence, chosen within a budget.

    position   0 ....... | ............................ | ............ context_len-1
               sink      |  selected: by attention mass |  recent window

`streaming` has no selection and gives its share to the recent window. A selection is a snapshot:
tokens that came after it join the recent window until the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.config import SelectionConfig


def select_streaming(
    context_lens: NDArray[np.int64],  # [batch]
    num_keys: NDArray[np.int64],  # [batch], the sink's tokens at least
    num_sink_tokens: int,
    sliding_window: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sink and recent window (StreamingLLM, arXiv 2309.17453; MagicDec section 4).

    At most num_keys positions of 0..context_len-1, ascending. A sliding-window layer sees no sink,
    so its whole share goes to the most recent positions, up to its own window. Returns [batch,
    widest], and how many each sequence has; what stands after them is nobody's.
    """
    counts = np.minimum(context_lens, num_keys)
    num_sink = np.full_like(context_lens, num_sink_tokens)
    if sliding_window is not None:
        is_cut = context_lens >= sliding_window
        counts = np.where(is_cut, np.minimum(counts, sliding_window), counts)
        num_sink[is_cut] = 0
    columns = np.arange(counts.max())
    skipped = (context_lens - counts)[:, None]
    return columns + np.where(columns >= num_sink[:, None], skipped, 0), counts


def layer_budget(config: SelectionConfig, layer: int, draft_budget: int) -> int:
    """KV positions that a draft step reads in one layer."""
    if layer < config.num_first_layers:
        return int(draft_budget * config.first_layers_factor)
    return draft_budget


@dataclass(frozen=True, slots=True)
class _Added:
    layers: tuple[int, ...]
    positions: torch.Tensor  # [len(layers), num_kv_heads, n]
    counts: tuple[int, ...]


@dataclass(slots=True)
class Selection:
    """The keys that one sequence's attention weighed most when it was observed.

    They lie in num_sink_tokens .. observed_len - num_recent_tokens - 1.
    """

    observed_len: int  # tokens of the sequence then
    # By layer: [num_kv_heads, n], best first.
    positions: dict[int, torch.Tensor] = field(default_factory=dict)
    _added: list[_Added] = field(default_factory=list)
    _slots: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _counts: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict)
    _packed: "PackedSelection | None" = None

    def add(self, layers: tuple[int, ...], positions: torch.Tensor, counts: Sequence[int]) -> None:
        """Of layers alike in KV heads, int64 [len(layers), num_kv_heads, n], best first; and how
        many of them each layer takes."""
        self._added.append(_Added(layers, positions.contiguous(), tuple(counts)))
        for layer, own, count in zip(layers, positions, counts, strict=True):
            self.positions[layer] = own[:, :count]

    def counts(self, layers: tuple[int, ...]) -> NDArray[np.int64]:
        """How many positions each of the layers has, [len(layers)]."""
        if layers not in self._counts:
            self._counts[layers] = np.array([self.positions[layer].shape[1] for layer in layers])
        return self._counts[layers]

    def slots(
        self, layers: tuple[int, ...], block_table: NDArray[np.int64], block_size: int
    ) -> torch.Tensor:
        """Slots of a head, of layers alike in KV heads: [len(layers), num_kv_heads, n].

        A layer with fewer repeats its first one. Found once, since a sequence's blocks stay where
        they are: a selection serves many rounds.
        """
        if layers not in self._slots:
            found = [self.positions[layer] for layer in layers]
            width = max(own.shape[1] for own in found)
            padded = [
                torch.cat([own, own[:, :1].expand(-1, width - own.shape[1])], dim=1)
                for own in found
            ]
            positions = torch.stack(padded)
            table = torch.from_numpy(block_table).to(positions.device)
            blocks = table[positions // block_size]
            self._slots[layers] = blocks * block_size + positions % block_size
        return self._slots[layers]

    def packed(self, num_layers: int) -> "PackedSelection":
        """Made once, since a selection serves many rounds: for whoever reads it on the device."""
        if self._packed is None:
            places = PackedSelection.no_places(num_layers)
            start = 0
            for added in self._added:
                size, width = added.positions[0].numel(), added.positions.shape[2]
                for i, layer in enumerate(added.layers):
                    places[layer] = start + i * size, width, added.counts[i]
                start += added.positions.numel()
            parts = [added.positions.flatten() for added in self._added]
            positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
            self._packed = PackedSelection(positions, places)
        return self._packed


@dataclass(frozen=True, slots=True)
class PackedSelection:
    """A selection's positions layer by layer, head by head."""

    positions: torch.Tensor  # int64
    # [num_layers, 3]: where a layer's begin, how many lie there a head, and how many it takes; -1
    # where the layer has none.
    places: NDArray[np.int32]

    @staticmethod
    def no_places(num_layers: int) -> NDArray[np.int32]:
        return np.tile(np.array([0, 0, -1], dtype=np.int32), (num_layers, 1))
