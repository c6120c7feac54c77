"""Choosing a draft's view: which keys the last rows of a sequence attended to, in each layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from magicdec.batch import ScheduledSequence
from magicdec.config import OBSERVATION_WINDOW, SelectionConfig
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.selection import rank_top
from magicdec.sparse_kv import Selection, layer_budget

_POOL_SIZE = 5  # SnapKV's average over neighbours (MagicDec section 5)
_MOST_SCORES = 1 << 26  # of layers scored at once, fp32


@dataclass(frozen=True, slots=True)
class Observation:
    """The last rows of one sequence in a verify forward, and how to choose by their attention."""

    index: int  # in the layout
    num_rows: int
    draft_budget: int
    pool_size: int
    chunk_size: int
    coverage: float
    selection: Selection  # filled after the forward


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


@dataclass(frozen=True, slots=True)
class _Shown:
    """One layer of a forward."""

    layer: int
    queries: Sequence[torch.Tensor]  # an observation
    k_cache: torch.Tensor
    scaling: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Of some layers, the positions of one sequence, best first, and how many each layer needs, or
    all."""

    selection: Selection
    layers: tuple[int, ...]
    positions: torch.Tensor  # [len(layers), num_kv_heads, n]
    needed: torch.Tensor | None  # [len(layers)]


class SelectionObserver:
    """Scores the observed rows against all of their keys, and keeps the best of each layer.

    Layers alike are scored at once. The host waits once for all sequences and layers, where a share
    of the mass says how many keys they need.
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
        self._shown: list[_Shown] = []

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

    def rows(self, starts: Sequence[int]) -> list[slice]:
        """See AttentionObserver."""
        shown = []
        for observation in self._observations:
            stop = starts[observation.index] + self._layout.query_lens[observation.index]
            shown.append(slice(stop - observation.num_rows, stop))
        return shown

    def observe(
        self,
        layer: int,
        queries: Sequence[torch.Tensor],
        k_cache: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """See AttentionObserver."""
        if sliding_window is None:
            self._shown.append(_Shown(layer, queries, k_cache, scaling, softcap))

    def finish(self) -> None:
        """See AttentionObserver."""
        ranked = [
            self._rank(place, layers)
            for place in range(len(self._observations))
            for layers in self._alike(self._num_keys(place))
        ]
        self._shown = []
        needed = [own.needed for own in ranked if own.needed is not None]
        counts = torch.cat(needed).tolist() if needed else []
        for own in ranked:
            mine = [own.positions.shape[2]] * len(own.layers)
            if own.needed is not None:
                mine, counts = counts[: len(mine)], counts[len(mine) :]
            own.selection.add(own.layers, own.positions, mine)

    def _num_keys(self, place: int) -> int:
        index = self._observations[place].index
        return self._layout.context_lens[index] + self._layout.query_lens[index]

    def _alike(self, num_keys: int) -> list[list[_Shown]]:
        """Layers of one shape and budget, as many as may have their scores in memory at once."""
        alike: dict[tuple[int, bool, float, float | None], list[_Shown]] = {}
        for shown in self._shown:
            is_first = shown.layer < self._config.num_first_layers
            key = (len(shown.k_cache), is_first, shown.scaling, shown.softcap)
            alike.setdefault(key, []).append(shown)
        groups = []
        for (num_heads, *_), layers in alike.items():
            most = max(_MOST_SCORES // max(num_heads * num_keys, 1), 1)
            groups += [layers[i : i + most] for i in range(0, len(layers), most)]
        return groups

    def _rank(self, place: int, layers: Sequence[_Shown]) -> _Ranked:
        observation, first_layer = self._observations[place], layers[0]
        mass = self._backend.mass(
            [shown.queries[place] for shown in layers],
            [shown.k_cache for shown in layers],
            self._layout,
            observation.index,
            first_layer.scaling,
            first_layer.softcap,
        )
        first = self._config.num_sink_tokens
        stop = observation.selection.observed_len - self._config.num_recent_tokens
        budget = layer_budget(self._config, first_layer.layer, observation.draft_budget)
        positions, needed = rank_top(
            mass,
            first,
            max(stop, first),
            budget - first - self._config.num_recent_tokens,
            observation.pool_size,
            observation.chunk_size,
            observation.coverage,
            self._backend.largest,
        )
        numbers = tuple(shown.layer for shown in layers)
        return _Ranked(observation.selection, numbers, positions, needed)
