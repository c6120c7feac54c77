"""What the draft may look at: logical positions of a sequence, chosen within a budget.

    position   0 ....... | ............................ | ............ context_len-1
               sink      |  selected: by attention mass |  recent window

`streaming` has no selection and gives its share to the recent window. A selection is a snapshot:
tokens that came after it join the recent window until the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.batch import ScheduledSequence
from magicdec.config import OBSERVATION_WINDOW, SelectionConfig
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.selection import select_top

_POOL_SIZE = 5  # SnapKV's average over neighbours (MagicDec section 5)


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


@dataclass(slots=True)
class Selection:
    """The keys that one sequence's attention weighed most when it was observed.

    They lie in num_sink_tokens .. observed_len - num_recent_tokens - 1.
    """

    observed_len: int  # tokens of the sequence then
    # By layer: [num_kv_heads, n], best first.
    positions: dict[int, torch.Tensor] = field(default_factory=dict)
    _slots: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _counts: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict)
    _packed: "PackedSelection | None" = None

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
            held = [self.positions.get(layer) for layer in range(num_layers)]
            counts = [0 if own is None else own.shape[1] for own in held]
            sizes = [0 if own is None else own.numel() for own in held]
            parts = [own.flatten() for own in held if own is not None]
            self._packed = PackedSelection(
                torch.cat(parts) if parts else torch.empty(0, dtype=torch.long),
                np.stack([np.cumsum(sizes) - sizes, counts], axis=1).astype(np.int32),
            )
        return self._packed


@dataclass(frozen=True, slots=True)
class PackedSelection:
    """A selection's positions layer by layer, head by head."""

    positions: torch.Tensor  # int64
    places: NDArray[np.int32]  # [num_layers, 2]: where a layer's begin, and how many a head has


@dataclass(frozen=True, slots=True)
class Observation:
    """The last rows of one sequence in a verify forward, and how to choose by their attention."""

    index: int  # in the layout
    num_rows: int
    draft_budget: int
    pool_size: int
    chunk_size: int
    coverage: float
    selection: Selection  # filled layer by layer


def observe_prompt(index: int, sequence: ScheduledSequence) -> Observation:
    """SnapKV (arXiv 2404.14469): the last rows of the prompt. The scheduler keeps a last chunk
    from having fewer of them than the window, unless the whole prompt does."""
    assert sequence.draft is not None
    return Observation(
        index,
        num_rows=min(OBSERVATION_WINDOW, len(sequence.token_ids)),
        draft_budget=sequence.draft.draft_budget,
        pool_size=_POOL_SIZE,
        chunk_size=1,
        coverage=1.0,
        selection=Selection(sequence.num_tokens),
    )


def observe_round(
    index: int, sequence: ScheduledSequence, num_rows: int, config: SelectionConfig
) -> Observation:
    """The rows of a verify pass, drafts that will be rejected included (Vegas, arXiv 2602.07223;
    PillarAttn, arXiv 2512.01278)."""
    assert sequence.draft is not None
    return Observation(
        index,
        num_rows=num_rows,
        draft_budget=sequence.draft.draft_budget,
        pool_size=1,
        chunk_size=config.chunk_size,
        coverage=config.coverage,
        selection=Selection(sequence.num_tokens),
    )


class SelectionObserver:
    """Scores the observed rows against all of their keys, layer by layer, and keeps the best.

    Sliding-window layers draft over the recent part of their own window instead.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        layout: PagedLayout,
        config: SelectionConfig,
        backend: AttentionBackend,
    ) -> None:
        self._observations = observations
        self._backend = backend
        self._layout = layout
        self._config = config
        self._row_stops = np.cumsum(layout.query_lens)

    @property
    def num_sequences(self) -> int:
        """See AttentionObserver."""
        return len(self._observations)

    def over(self, sequences: Sequence[int], layout: PagedLayout) -> "SelectionObserver":
        """See AttentionObserver."""
        places = {index: place for place, index in enumerate(sequences)}
        observations = [
            replace(observation, index=places[observation.index])
            for observation in self._observations
            if observation.index in places
        ]
        return SelectionObserver(observations, layout, self._config, self._backend)

    def observe(
        self,
        layer: int,
        query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """See AttentionObserver."""
        if sliding_window is not None:
            return
        for observation in self._observations:
            stop = observation.selection.observed_len - self._config.num_recent_tokens
            end = int(self._row_stops[observation.index])
            rows = query[:, end - observation.num_rows : end]
            mass = self._backend.mass(
                rows, k_cache, self._layout, observation.index, scaling, softcap
            )
            budget = layer_budget(self._config, layer, observation.draft_budget)
            first = self._config.num_sink_tokens
            observation.selection.positions[layer] = select_top(
                mass,
                first,
                max(stop, first),
                budget - first - self._config.num_recent_tokens,
                observation.pool_size,
                observation.chunk_size,
                observation.coverage,
                self._backend.largest,
            )
