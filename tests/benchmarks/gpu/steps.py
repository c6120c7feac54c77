"""One model's steps at one point, timed as a runner runs them; by graphs where they are had."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from magicdec.attention import PagedAttention, row_positions
from magicdec.batch import ScheduledSequence
from magicdec.config import SelectionConfig
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.graphs.capture import Capturer
from magicdec.graphs.draft_graphs import DraftGraphs, DraftRound
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.kernels.dispatch import select_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel
from magicdec.sampler import SamplerRow
from magicdec.target_forward import StepRows, TargetForward
from magicdec.types import SamplingParams

_WARM_UPS = 2
_READ_BLOCK = 4096
_READ_CHUNK = 1 << 16
_CHUNK_ROWS = 512  # of a prompt, beside plain rows
_GREEDY = SamplingParams(temperature=0.0)


@triton.jit
def _sum_chunks(source, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        acc += tl.load(source + chunk * CHUNK + start + tl.arange(0, BLOCK))
    tl.store(sums + chunk, tl.sum(acc, 0))


def read_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a kernel that only adds them up, the best of its runs."""
    source = torch.ones(num_bytes // 4, device=device)
    num_chunks = len(source) // _READ_CHUNK
    sums = torch.empty(num_chunks, device=device)

    def read() -> torch.Tensor:
        if device.type == "cpu":
            return source.sum()
        _sum_chunks[(num_chunks,)](source, sums, CHUNK=_READ_CHUNK, BLOCK=_READ_BLOCK, num_warps=8)
        return sums

    return num_bytes / min(seconds_of(read, device, times=1, repeats=1) for _ in range(8))


def seconds_of(
    work: Callable[[], torch.Tensor], device: torch.device, times: int, repeats: int
) -> float:
    """The median of so many; on a GPU several in one graph, so that no launch is in it."""
    if device.type == "cpu":
        return float(np.median([_timed(work, device) for _ in range(times)]))
    for _ in range(_WARM_UPS):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    measured = []
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize(device)
        measured.append(start.elapsed_time(stop) / 1e3 / repeats)
    return float(np.median(measured))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class Steps:
    """`batch` sequences of `context` tokens, whose blocks lie anywhere; greedy tokens."""

    def __init__(
        self,
        model: LoadedModel,
        batch: int,
        context: int,
        block_size: int,
        draft_length: int,
        draft_budget: int,
    ) -> None:
        self._model = model
        self._batch, self._context = batch, context
        self._draft_length, self._draft_budget = draft_length, draft_budget
        self._backend = select_backend(model.device, model.kv_dtype)
        blocks = -(-(context + draft_length + 1) // block_size)
        order = np.random.default_rng(0).permutation(batch * blocks)
        self._tables = tuple(np.split(order, batch))
        chunk_blocks = -(-_CHUNK_ROWS // block_size)
        self._chunk_table = batch * blocks + np.arange(chunk_blocks)
        num_blocks = batch * blocks + chunk_blocks
        self._cache = PagedKVCache(
            model.layers, block_size, num_blocks, model.kv_dtype, model.device
        )
        self._forwards: ForwardGraphs | None = None
        self._drafts: DraftGraphs | None = None
        if self._backend.paged_on_device is not None:
            shared = self._cache, self._backend, Capturer(model.device), context
            self._forwards = ForwardGraphs(model.forward, *shared)
            self._drafts = DraftGraphs(
                model.forward, model.layers, *shared, lambda rows: True, model.vocabulary
            )

    def floor_bytes(self, num_keys: int) -> int:
        """Weights once, and so many keys and values of each sequence. Of the embedding a step
        reads some rows alone, unless it is the head as well."""
        module: Any = self._model.module
        read = {id(p): p.numel() * p.element_size() for p in module.parameters()}
        embedding = module.get_input_embeddings().weight
        if module.get_output_embeddings().weight is not embedding:
            del read[id(embedding)]
        weights: int = sum(read.values())
        per_token = sum(2 * k.shape[0] * k.shape[2] * k.element_size() for k in self._cache.k)
        return weights + self._batch * num_keys * per_token

    @torch.inference_mode()
    def measure(self, num_rounds: int) -> dict[str, list[float]]:
        """Seconds of each kind of step, round by round."""
        times: dict[str, list[float]] = {
            kind: []
            for kind in ("plain_eager", "plain", "views", "draft", "verify", "packed", "mixed")
        }
        for number in range(num_rounds + _WARM_UPS):
            found = self._round()
            if number >= _WARM_UPS:
                for kind, seconds in found.items():
                    times[kind].append(seconds)
        return times

    def _round(self) -> dict[str, float]:
        device = self._model.device
        found = {"plain_eager": _timed(lambda: self._eager(1), device)}
        if self._forwards is not None:
            found["plain"] = _timed(lambda: self._replayed(1), device)
        verify = self._replayed if self._forwards is not None else self._eager
        found["verify"] = _timed(lambda: verify(self._draft_length + 1), device)
        found["views"], found["draft"] = self._drafting()
        found["packed"] = _timed(lambda: self._beside_a_chunk(None), device)
        if self._forwards is not None:
            found["mixed"] = _timed(lambda: self._beside_a_chunk(self._forwards), device)
        return found

    def _layout(self, num_rows: int) -> PagedLayout:
        context_lens = (self._context,) * self._batch
        query_lens = (num_rows,) * self._batch
        return PagedLayout(query_lens, context_lens, self._tables, self._cache.block_size)

    def _eager(self, num_rows: int) -> list[int]:
        layout = self._layout(num_rows)
        attention = PagedAttention(self._cache, layout, self._backend)
        token_ids = torch.zeros(self._batch * num_rows, dtype=torch.long)
        logits = self._model.forward(token_ids, row_positions(layout), attention)
        return _greedy(logits)

    def _replayed(self, num_rows: int) -> list[int]:
        assert self._forwards is not None
        token_ids = torch.zeros(self._batch * num_rows, dtype=torch.long)
        keep = torch.arange(len(token_ids))
        return _greedy(self._forwards.forward(self._layout(num_rows), token_ids, keep))

    def _drafting(self) -> tuple[float, float]:
        """Of a round's views, and of one of its steps: a share of all of them."""
        started = time.perf_counter()
        views = DraftViews(
            self._layout(1),
            SelectionConfig(),
            self._draft_length,
            [self._draft_budget] * self._batch,
            [None] * self._batch,
        )
        attention = DraftAttention(self._cache, self._backend, views)
        rows = [SamplerRow(_GREEDY, self._context + 1, None, 1)] * self._batch
        replayed = None
        if self._drafts is not None:
            replayed = self._drafts.begin(views, rows)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        viewed = time.perf_counter() - started
        started = time.perf_counter()
        if replayed is None:
            self._draft_eagerly(attention)
        else:
            self._draft_by_replays(rows, replayed)
        return viewed, (time.perf_counter() - started) / self._draft_length

    def _draft_eagerly(self, attention: DraftAttention) -> None:
        token_ids = torch.zeros(self._batch, dtype=torch.long)
        for number in range(self._draft_length):
            positions = attention.begin_step(number)
            logits = self._model.forward(token_ids, positions, attention)
            token_ids = torch.tensor(_greedy(logits))

    def _draft_by_replays(self, rows: list[SamplerRow], replayed: DraftRound) -> None:
        replayed.draft(
            token_ids=[0] * self._batch,
            positions=[self._context] * self._batch,
            last=[self._context + self._draft_length] * self._batch,
            rows=rows,
        ).rows()

    def _beside_a_chunk(self, graphs: ForwardGraphs | None) -> list[int]:
        """Plain rows and a prompt's first chunk, in one forward or, with graphs, in two."""
        plain = [self._sequence(table, 1, self._context, _GREEDY) for table in self._tables]
        chunk = self._sequence(self._chunk_table, _CHUNK_ROWS, 0, None)
        drafts: list[tuple[()]] = [()] * (len(plain) + 1)
        step = StepRows.of([*plain, chunk], drafts, self._cache.block_size)
        forward = TargetForward(self._model.forward, self._cache, self._backend, graphs)
        return _greedy(forward(step, ()))

    def _sequence(
        self, table: NDArray[np.int64], num_rows: int, start: int, sampling: SamplingParams | None
    ) -> ScheduledSequence:
        ids = np.zeros(num_rows, dtype=np.int64)
        return ScheduledSequence(0, ids, start, table, sampling, 1, None, None)


def _greedy(logits: torch.Tensor) -> list[int]:
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    return chosen
