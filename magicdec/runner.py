"""One rank: everything that touches the device happens here."""

import time

import numpy as np
import torch

from magicdec.attention import AttentionContext, PagedAttention, row_positions
from magicdec.batch import Batch, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import EngineConfig
from magicdec.drafters.base import Drafter
from magicdec.drafters.build import build_drafters, num_blocks_beside_draft
from magicdec.drafters.draft_model import DraftModel
from magicdec.graphs.capture import Capturer
from magicdec.graphs.draft_graphs import DraftGraphs
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.kernels.dispatch import select_backend, select_gumbel_argmax
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, load_draft_model, load_model, read_model_facts
from magicdec.profiling.device_rates import RankDevice, measure_device
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.verification import VerificationRule, verification_rule


class ModelRunner:
    """Draft, verify, accept: a rank's whole share of a step.

    Logits are bit-identical on every rank of a sharded model, so each rank samples for itself and
    a step needs no exchange beyond the model's own all-reduces.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        facts = read_model_facts(config.model.path)
        self._max_model_len = config.model.max_model_len or facts.max_position_embeddings
        sampler = Sampler(facts.eos_token_ids, select_gumbel_argmax(model.device))
        self._rule: VerificationRule = verification_rule(config.speculation.verification, sampler)
        block_size = config.cache.block_size
        self._backend = select_backend(model.device, model.kv_dtype, block_size)
        draft = load_draft_model(config, model.device)
        self._draft_model = (
            None if draft is None else DraftModel(draft.forward, draft.layers, draft.vocab_size)
        )
        self._cache: PagedKVCache | None = None
        self._drafters: dict[str, Drafter] = {}
        self._graphs: ForwardGraphs | None = None

    @classmethod
    def load(cls, config: EngineConfig) -> "ModelRunner":
        """The whole model on this process's device."""
        if config.parallel.num_threads is not None:
            torch.set_num_threads(config.parallel.num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(config.model, device), config)

    @property
    def attention_backend(self) -> str:
        return self._backend.name

    @property
    def num_blocks(self) -> int:
        return self._pages.num_blocks

    @property
    def _pages(self) -> PagedKVCache:
        assert self._cache is not None, "allocate_cache comes before the first step"
        return self._cache

    def measure_device(self) -> RankDevice:
        """Takes a fraction of a second. The dtype is the one that the linears run in."""
        weights = next(self._model.module.parameters())
        return measure_device(weights.device, weights.dtype, self._model.weight_element_bytes)

    def num_affordable_blocks(self) -> int:
        model = self._model
        return num_blocks_beside_draft(
            model.layers, self._draft_model, model.kv_dtype, self._config
        )

    def allocate_cache(self, num_blocks: int) -> None:
        """Every rank gets the same count: one block table serves them all."""
        model = self._model
        self._cache = PagedKVCache(
            model.layers, self._config.cache.block_size, num_blocks, model.kv_dtype, model.device
        )
        draft_graphs: DraftGraphs | None = None
        # Of a sharded model the ranks' exchanges are launched from the host.
        is_whole = self._config.parallel.tensor_parallel_size == 1
        if is_whole and self._backend.paged_on_device is not None:
            shared = self._cache, self._backend, Capturer(model.device)
            self._graphs = ForwardGraphs(self.forward, *shared, self._max_model_len)
            draft_graphs = DraftGraphs(
                self.forward, model.layers, *shared, self._rule.only_scales
            )
        self._drafters = build_drafters(
            self.forward,
            self._rule.propose,
            self._cache,
            self._backend,
            self._config,
            model.vocab_size,
            self._draft_model,
            draft_graphs,
        )

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Runs one step; the batch's decode rows and prefill chunks share the verify forward."""
        started = time.perf_counter()
        self._release(batch.released)
        drafts = self._draft(batch)
        drafted = time.perf_counter()
        emitted, num_observed = self._verify(batch, drafts)
        results = tuple(
            SequenceResult(tokens, tuple(p.token_id for p in draft))
            for tokens, draft in zip(emitted, drafts, strict=True)
        )
        verify_seconds = time.perf_counter() - drafted
        return StepResult(results, drafted - started, verify_seconds, num_observed)

    def _release(self, sequence_ids: tuple[int, ...]) -> None:
        for drafter in self._each_drafter():
            drafter.release(sequence_ids)

    def _draft(self, batch: Batch) -> list[tuple[Proposal, ...]]:
        """Each drafter proposes for its own sequences in one call."""
        drafts: list[tuple[Proposal, ...]] = [() for _ in batch.sequences]
        for drafter in self._each_drafter():
            mine = [
                i
                for i, s in enumerate(batch.sequences)
                if s.draft is not None
                and s.draft_length > 0
                and self._drafters[s.draft.drafter] is drafter
            ]
            if mine:
                proposed = drafter.propose([batch.sequences[i] for i in mine])
                for i, draft in zip(mine, proposed, strict=True):
                    drafts[i] = draft
        return drafts

    def _each_drafter(self) -> list[Drafter]:
        """Each one once: several names may be one drafter's."""
        return list({id(drafter): drafter for drafter in self._drafters.values()}.values())

    def _verify(
        self, batch: Batch, drafts: list[tuple[Proposal, ...]]
    ) -> tuple[list[tuple[int, ...]], int]:
        """The tokens each sequence emits, none for a chunk that ends before the last token; and
        how many sequences were observed."""
        layout, token_ids = _pack(batch.sequences, drafts, self._pages.block_size)
        watched = [drafter.watch(batch.sequences, layout) for drafter in self._each_drafter()]
        observers = [observer for observer in watched if observer is not None]
        keep, rows = _sampled_rows(batch.sequences, drafts)
        if self._graphs is not None and not observers and self._graphs.fits(layout):
            logits = self._graphs.forward(layout, token_ids, keep)
        else:
            attention = PagedAttention(self._pages, layout, self._backend, observers)
            logits = self.forward(token_ids, row_positions(layout), attention, keep)
        sampled = [
            d for d, s in zip(drafts, batch.sequences, strict=True) if s.sampling is not None
        ]
        emitted = iter(self._rule.verify(logits, rows, sampled) if rows else [])
        num_observed = sum(observer.num_sequences for observer in observers)
        return [() if s.sampling is None else next(emitted) for s in batch.sequences], num_observed

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_rows]
        positions: torch.Tensor,  # [num_rows]
        attention: AttentionContext,
        keep: torch.Tensor | None = None,  # [num_kept] rows whose logits are wanted; None: all
    ) -> torch.Tensor:
        """Logits [num_kept, vocab_size] of one packed forward."""
        return self._model.forward(token_ids, positions, attention, keep)


def _pack(
    sequences: tuple[ScheduledSequence, ...], drafts: list[tuple[Proposal, ...]], block_size: int
) -> tuple[PagedLayout, torch.Tensor]:
    """The step's rows back to back: each sequence's tokens, then its draft."""
    layout = PagedLayout(
        query_lens=tuple(len(s.token_ids) + len(d) for s, d in zip(sequences, drafts, strict=True)),
        context_lens=tuple(s.num_computed_tokens for s in sequences),
        block_tables=tuple(s.block_table for s in sequences),
        block_size=block_size,
    )
    pieces = [
        np.concatenate([s.token_ids, np.array([p.token_id for p in d], dtype=np.int64)])
        for s, d in zip(sequences, drafts, strict=True)
    ]
    return layout, torch.from_numpy(np.concatenate(pieces))


def _sampled_rows(
    sequences: tuple[ScheduledSequence, ...], drafts: list[tuple[Proposal, ...]]
) -> tuple[torch.Tensor, list[SamplerRow]]:
    """Packed indices of the rows to sample from, and what to choose there."""
    keep: list[int] = []
    rows: list[SamplerRow] = []
    start = 0
    for sequence, draft in zip(sequences, drafts, strict=True):
        stop = start + len(sequence.token_ids) + len(draft)
        if sequence.sampling is not None:
            keep.extend(range(stop - len(draft) - 1, stop))
            drafted = tuple(p.token_id for p in draft)
            rows.extend(SamplerRow.after(sequence, drafted[:i]) for i in range(len(draft) + 1))
        start = stop
    return torch.tensor(keep, dtype=torch.long), rows
