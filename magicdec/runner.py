"""One rank: everything that touches the device happens here."""

import time

import numpy as np
import torch

from magicdec.attention import AttentionContext, PagedAttention, row_positions
from magicdec.batch import Batch, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import EngineConfig
from magicdec.drafters.base import Drafter
from magicdec.drafters.self_draft import SelfDrafter
from magicdec.kernels.dispatch import select_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache, num_affordable_blocks
from magicdec.model_loader import LoadedModel, load_model, read_model_facts
from magicdec.sampler import Sampler, SamplerRow
from magicdec.verification import accept


class ModelRunner:
    """Draft, verify, accept: a rank's whole share of a step.

    Logits are bit-identical on every rank of a sharded model, so each rank samples for itself and
    a step needs no exchange beyond the model's own all-reduces.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        self._sampler = Sampler(read_model_facts(config.model.path).eos_token_ids)
        self._backend = select_backend(model.device, model.kv_dtype)
        self._cache: PagedKVCache | None = None
        self._drafter: Drafter | None = None

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

    def num_affordable_blocks(self) -> int:
        return num_affordable_blocks(self._model.layers, self._model.kv_dtype, self._config.cache)

    def allocate_cache(self, num_blocks: int) -> None:
        """Every rank gets the same count: one block table serves them all."""
        model = self._model
        self._cache = PagedKVCache(
            model.layers, self._config.cache.block_size, num_blocks, model.kv_dtype, model.device
        )
        self._drafter = SelfDrafter(
            self.forward,
            self._cache,
            self._backend,
            self._sampler,
            self._config.speculation.num_sink_tokens,
        )

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Runs one step; the batch's decode rows and prefill chunks share the verify forward."""
        started = time.perf_counter()
        drafts = self._draft(batch)
        drafted = time.perf_counter()
        targets = self._verify(batch, drafts)
        results = tuple(
            SequenceResult(accept(draft, target) if target else (), len(draft))
            for draft, target in zip(drafts, targets, strict=True)
        )
        return StepResult(results, drafted - started, time.perf_counter() - drafted)

    def _draft(self, batch: Batch) -> list[tuple[int, ...]]:
        drafting = [s for s in batch.sequences if s.draft_length > 0]
        if not drafting:
            return [()] * len(batch.sequences)
        assert self._drafter is not None
        proposed = iter(self._drafter.propose(drafting, batch.draft_budget))
        return [next(proposed) if s.draft_length > 0 else () for s in batch.sequences]

    def _verify(self, batch: Batch, drafts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The target's own choice after each prefix of the draft; none for an unfinished chunk."""
        layout, token_ids = _pack(batch.sequences, drafts, self._pages.block_size)
        attention = PagedAttention(self._pages, layout, self._backend)
        keep, rows = _sampled_rows(batch.sequences, drafts)
        logits = self.forward(token_ids, row_positions(layout), attention, keep)
        chosen = iter(self._sampler.sample(logits, rows) if rows else [])
        return [
            tuple(next(chosen) for _ in range(len(draft) + 1)) if s.sampling is not None else ()
            for s, draft in zip(batch.sequences, drafts, strict=True)
        ]

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_rows]
        positions: torch.Tensor,  # [num_rows]
        attention: AttentionContext,
        keep: torch.Tensor | None = None,  # [num_kept] rows whose logits are wanted; None: all
    ) -> torch.Tensor:
        """Logits [num_kept, vocab_size] of one packed forward."""
        device = self._model.device
        keep = torch.arange(len(token_ids)) if keep is None else keep
        output = self._model.module(
            input_ids=token_ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            logits_to_keep=keep.to(device),
            attention_context=attention,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _pack(
    sequences: tuple[ScheduledSequence, ...], drafts: list[tuple[int, ...]], block_size: int
) -> tuple[PagedLayout, torch.Tensor]:
    """The step's rows back to back: each sequence's tokens, then its draft."""
    layout = PagedLayout(
        query_lens=tuple(len(s.token_ids) + len(d) for s, d in zip(sequences, drafts, strict=True)),
        context_lens=tuple(s.num_computed_tokens for s in sequences),
        block_tables=tuple(s.block_table for s in sequences),
        block_size=block_size,
    )
    pieces = [
        np.concatenate([s.token_ids, np.array(d, dtype=np.int64)])
        for s, d in zip(sequences, drafts, strict=True)
    ]
    return layout, torch.from_numpy(np.concatenate(pieces))


def _sampled_rows(
    sequences: tuple[ScheduledSequence, ...], drafts: list[tuple[int, ...]]
) -> tuple[torch.Tensor, list[SamplerRow]]:
    """Packed indices of the rows to sample from, and what to choose there."""
    keep: list[int] = []
    rows: list[SamplerRow] = []
    start = 0
    for sequence, draft in zip(sequences, drafts, strict=True):
        stop = start + len(sequence.token_ids) + len(draft)
        if sequence.sampling is not None:
            keep.extend(range(stop - len(draft) - 1, stop))
            rows.extend(SamplerRow.after(sequence, draft[:i]) for i in range(len(draft) + 1))
        start = stop
    return torch.tensor(keep, dtype=torch.long), rows
