"""CUDA graphs of a packed forward: one launch in place of some hundred.

    bucket    sequences of a graph, a power of two; one that is not there has no rows
    tier      rows a sequence: its last token and its drafts
    row       | sequence 0: tier rows | sequence 1: tier rows | ...

A shorter draft leaves its last rows out: what they compute is never looked at, and nothing of
theirs is written to the pages. A graph is captured when a step first needs it. It keeps every
layer's queries, so that observers see the attention of a replayed forward, after it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from magicdec.attention import AttentionObserver
from magicdec.drafts import resolve
from magicdec.graphs.capture import NUM_STAGINGS, Capturer, Graph, KeptForward
from magicdec.graphs.forward_inputs import MOST_ROWS, NO_SLOT, TIERS, ForwardInputs, Shape
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.heads import Heads
from magicdec.kernels.paged_layout import DeviceLayout, PagedLayout
from magicdec.kv_cache import PagedKVCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Attended:
    """What a layer asked for; the query is where each replay leaves it."""

    query: torch.Tensor  # [num_query_heads, num_rows, head_dim]
    scaling: float
    sliding_window: int | None
    softcap: float | None


class GraphAttention:
    """An attention context that reads a step's layout on the device alone."""

    def __init__(
        self,
        cache: PagedKVCache,
        backend: AttentionBackend,
        layout: DeviceLayout,
        slots: torch.Tensor,  # int32 [num_rows]
    ) -> None:
        assert backend.paged_on_device is not None, f"{backend.name} reads its layout on the host"
        self._cache = cache
        self._store, self._paged = backend.store, backend.paged_on_device
        self.layout = layout
        self._slots = slots
        self._attended: dict[int, _Attended] = {}

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
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        query = heads.stored(self._store, k_cache, v_cache, self._slots)
        self._attended[layer] = _Attended(query, scaling, sliding_window, softcap)
        return self._paged(query, k_cache, v_cache, self.layout, scaling, sliding_window, softcap)

    def show(self, observers: Sequence[AttentionObserver], row_starts: Sequence[int]) -> None:
        """The last forward's attention, of sequences whose rows begin there.

        As good as while it ran: nothing has written to the pages since."""
        for observer in observers:
            shown = observer.rows(row_starts)
            for layer, attended in self._attended.items():
                observer.observe(
                    layer,
                    [attended.query[:, rows] for rows in shown],
                    self._cache.k[layer],
                    scaling=attended.scaling,
                    sliding_window=attended.sliding_window,
                    softcap=attended.softcap,
                )
            observer.finish()


@dataclass(frozen=True, slots=True)
class StaticForward:
    """A forward that reads one buffer: what a graph captures."""

    forward: KeptForward
    buffer: torch.Tensor  # int32, see Shape.sizes
    token_ids: torch.Tensor  # [num_rows], of the buffer
    positions: torch.Tensor
    kept: torch.Tensor  # [num_rows], of the buffer: for whoever reads the logits
    attention: GraphAttention
    all_rows: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """Logits [num_rows, vocab_size]."""
        return self.forward(self.token_ids, self.positions, self.attention, self.all_rows)

    @property
    def static(self) -> list[torch.Tensor]:
        """All that a replay finds again, beside weights and pages."""
        layout = self.attention.layout
        return [self.buffer, self.all_rows, layout.row_starts, layout.short_rows]


def static_forward(
    forward: KeptForward,
    cache: PagedKVCache,
    backend: AttentionBackend,
    shape: Shape,
    buffer: torch.Tensor,  # int32, on the device
) -> StaticForward:
    token_ids, positions, slots, kept, query_lens, context_lens, tables = buffer.split_with_sizes(
        shape.sizes
    )
    rows = torch.arange(shape.num_rows, dtype=torch.int32, device=buffer.device)
    layout = DeviceLayout(
        row_starts=rows[:: shape.tier].contiguous(),
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables.view(shape.bucket, -1),
        short=rows[: shape.bucket],
        long=rows[:0],
        short_rows=rows,
        most_rows=shape.tier,
        most_long_rows=0,
        most_keys=shape.num_columns * cache.block_size,
        block_size=cache.block_size,
    )
    attention = GraphAttention(cache, backend, layout, slots)
    return StaticForward(forward, buffer, token_ids, positions, kept, attention, rows.long())


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    step: StaticForward  # holds what the graph reads
    # In pinned memory, then copied to the step's buffer.
    stagings: Iterator[tuple[torch.Tensor, ForwardInputs]]
    logits: torch.Tensor  # [num_rows, vocab_size]


class ForwardGraphs:
    """Of one model on one GPU, for sequences of at most MOST_ROWS rows."""

    def __init__(
        self,
        forward: KeptForward,
        cache: PagedKVCache,
        backend: AttentionBackend,
        capturer: Capturer,
        max_model_len: int,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._backend = backend
        self._capturer = capturer
        self._device = cache.k[0].device
        blocks = -(-(max_model_len + MOST_ROWS) // cache.block_size)
        self._num_columns = min(blocks, cache.num_blocks)
        self._captured: dict[Shape, _Captured] = {}
        self._last: tuple[GraphAttention, int] | None = None  # of the last forward, and its tier

    def forward(
        self,
        layout: PagedLayout,
        token_ids: torch.Tensor,  # [num_rows], on the host
        keep: torch.Tensor,  # [num_kept], on the host
        observers: Sequence[AttentionObserver] = (),
        drafted: torch.Tensor | None = None,  # what token_ids refer to, see drafts.resolve
    ) -> torch.Tensor:
        """Logits [num_kept, vocab_size]; the rows' K/V are in the pages then."""
        tier = next(tier for tier in TIERS if tier >= max(layout.query_lens))
        bucket = 1 << (len(layout.query_lens) - 1).bit_length()
        shape = Shape(bucket, tier, self._num_columns)
        if shape not in self._captured:
            self._captured[shape] = self._capture(shape)
        captured = self._captured[shape]
        step = captured.step
        staging, inputs = next(captured.stagings)
        inputs.write(layout, token_ids.numpy(), keep.numpy())
        step.buffer.copy_(staging, non_blocking=True)
        if drafted is not None:
            resolve(step.token_ids, drafted)
        captured.graph.replay()
        self._last = step.attention, tier
        self.show(observers, range(len(layout.query_lens)))
        return captured.logits.index_select(0, step.kept[: len(keep)])

    def show(self, observers: Sequence[AttentionObserver], sequences: Sequence[int]) -> None:
        """The last forward's attention, of these of its sequences, to observers of as many. No
        graph has been replayed since."""
        if observers:
            assert self._last is not None, "nothing has been replayed"
            attention, tier = self._last
            attention.show(observers, [tier * i for i in sequences])

    def _capture(self, shape: Shape) -> _Captured:
        stagings = [
            self._capturer.staging(sum(shape.sizes), torch.int32) for _ in range(NUM_STAGINGS)
        ]
        stagings[0].split_with_sizes(shape.sizes)[2].fill_(NO_SLOT)
        buffer = stagings[0].to(self._device, copy=True)
        step = static_forward(self._forward, self._cache, self._backend, shape, buffer)
        graph, logits = self._capturer.capture(step)
        logger.info("captured a forward of %d x %d rows", shape.bucket, shape.tier)
        pairs = [(staging, ForwardInputs(shape, staging.numpy())) for staging in stagings]
        return _Captured(graph, step, cycle(pairs), logits)
