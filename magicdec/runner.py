"""One rank: everything that touches the device happens here."""

import time
from functools import partial

import torch

from magicdec.attention import AttentionContext
from magicdec.batch import Batch, SequenceResult, StepResult
from magicdec.config import EngineConfig
from magicdec.drafters.build import build_drafters, num_blocks_beside_draft, pool_bytes
from magicdec.drafters.draft_model import DraftModel
from magicdec.drafters.rank_drafters import Drafted, RankDrafters
from magicdec.drafts import token_ids_of
from magicdec.graphs.capture import Capturer
from magicdec.graphs.draft_graphs import DraftGraphs
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.graphs.replay_trial import replays_agree
from magicdec.kernels.dispatch import select_backend, select_gumbel_argmax
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, load_draft_model, load_model, read_model_facts
from magicdec.profiling.device_rates import RankDevice, measure_device
from magicdec.profiling.memory_profile import (
    DeviceMemory,
    device_memory,
    largest_step,
    profile_memory,
    size_pool,
)
from magicdec.sampler import Sampler
from magicdec.target_forward import StepRows, TargetForward
from magicdec.verification import VerificationRule, verification_rule


class ModelRunner:
    """Draft, verify, accept: a rank's whole share of a step.

    Each rank of a sharded model has the logits of its share of the vocabulary. All choose together
    and know what was chosen, so they go on alike without a word from the engine.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, memory: DeviceMemory | None = None
    ) -> None:
        """`memory` is what the KV pool has to fit into; None: what is set is taken as it is."""
        self._model = model
        self._memory = memory
        self._config = config
        facts = read_model_facts(config.model.path)
        limit = facts.max_position_embeddings
        self._max_model_len = min(config.model.max_model_len or limit, limit)
        sampler = Sampler(facts.eos_token_ids, select_gumbel_argmax(model.device))
        rule = config.speculation.verification
        self._rule: VerificationRule = verification_rule(rule, sampler, model.vocabulary)
        self._draft_rule = verification_rule(rule, sampler)  # a draft model is whole on every rank
        block_size = config.cache.block_size
        self._backend = select_backend(model.device, model.kv_dtype, block_size)
        draft = load_draft_model(config, model.device)
        self._draft_model = (
            None if draft is None else DraftModel(draft.forward, draft.layers, draft.vocab_size)
        )
        self._cache: PagedKVCache | None = None
        self._drafters = RankDrafters({}, model.device)
        self._target_forward: TargetForward | None = None

    @classmethod
    def load(cls, config: EngineConfig) -> "ModelRunner":
        """The whole model on this process's device."""
        if config.parallel.num_threads is not None:
            torch.set_num_threads(config.parallel.num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(config.model, device), config, device_memory(device))

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
        """Whole blocks of the KV pool, which is sized by what the device's memory has left.

        Runs a step for it: ranks of a sharded model call this together. Raises ConfigError.
        """
        model, config = self._model, self._config
        held = model.layers, self._draft_model, model.kv_dtype
        if self._memory is None:
            return num_blocks_beside_draft(*held, config)
        return size_pool(
            profile_memory(self._memory, self._run_largest_step),
            config,
            blocks_in=lambda sized: num_blocks_beside_draft(*held, sized),
            bytes_of=lambda num_blocks: pool_bytes(*held, config, num_blocks),
        )

    @torch.inference_mode()
    def _run_largest_step(self) -> int:
        """Over a cache of one block, whose bytes it returns."""
        model = self._model
        batch, drafts = largest_step(self._config, self._max_model_len)
        self._cache = PagedKVCache(
            model.layers, self._config.cache.block_size, 1, model.kv_dtype, model.device
        )
        self._target_forward = TargetForward(self.forward, self._cache, self._backend, None)
        self._verify(batch, Drafted(drafts, []))
        pages = (*self._cache.k, *self._cache.v)
        self._cache = self._target_forward = None
        return sum(page.nbytes for page in pages)

    def allocate_cache(self, num_blocks: int) -> None:
        """Every rank gets the same count: one block table serves them all."""
        model = self._model
        self._cache = PagedKVCache(
            model.layers, self._config.cache.block_size, num_blocks, model.kv_dtype, model.device
        )
        graphs, draft_graphs = self._graphs(self._cache)
        self._target_forward = TargetForward(self.forward, self._cache, self._backend, graphs)
        by_name = build_drafters(
            self.forward,
            self._rule.propose,
            self._cache,
            self._backend,
            self._config,
            model.vocab_size,
            self._draft_model,
            self._draft_rule.propose,
            draft_graphs,
        )
        self._drafters = RankDrafters(by_name, model.device)

    def _graphs(self, cache: PagedKVCache) -> tuple[ForwardGraphs | None, DraftGraphs | None]:
        """Of a sharded model NCCL's exchanges are captured with the rest; gloo's run on the host,
        and its steps are launched."""
        model, backend = self._model, self._backend
        is_whole = self._config.parallel.tensor_parallel_size == 1
        if backend.paged_on_device is None or not (is_whole or model.device.type == "cuda"):
            return None, None
        shared = cache, backend, Capturer(model.device), self._max_model_len
        graphs = ForwardGraphs(self.forward, *shared)
        own = cache, backend, graphs, model.vocabulary
        if not (is_whole or replays_agree(self.forward, *own)):
            return None, None
        rule = self._rule.only_scales, model.vocabulary
        return graphs, DraftGraphs(self.forward, model.layers, *shared, *rule)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Runs one step: drafts, then the target's forward over all rows of the batch."""
        started = time.perf_counter()
        self._drafters.release(batch.released)
        drafted = self._drafters.propose(batch.sequences)
        emitted, num_observed = self._verify(batch, drafted)
        results = tuple(
            SequenceResult(tokens, tuple(token_ids_of(draft)))
            for tokens, draft in zip(emitted, drafted.drafts, strict=True)
        )
        draft_seconds, verify_seconds = drafted.divide(time.perf_counter() - started)
        return StepResult(results, draft_seconds, verify_seconds, num_observed)

    def _verify(self, batch: Batch, drafted: Drafted) -> tuple[list[tuple[int, ...]], int]:
        """The tokens each sequence emits, none for a chunk that ends before the last token; and
        how many sequences were observed."""
        step = StepRows.of(batch.sequences, drafted.drafts, self._pages.block_size)
        observers = self._drafters.watch(batch, step.layout)
        assert self._target_forward is not None, "allocate_cache comes before the first step"
        logits = self._target_forward(step, observers)
        emitted: list[tuple[int, ...]] = [() for _ in batch.sequences]
        sampled = step.sampled()
        if sampled:
            own = [drafted.drafts[i] for i in sampled]
            meanwhile = partial(self._begin_next, batch, step, drafted)
            chosen = self._rule.verify(logits, step.choices(), own, meanwhile)
            for i, tokens in zip(sampled, chosen, strict=True):
                emitted[i] = tokens
        return emitted, sum(observer.num_sequences for observer in observers)

    def _begin_next(
        self, batch: Batch, step: StepRows, drafted: Drafted, chosen: torch.Tensor
    ) -> None:
        """While the host is about to wait for what was chosen: the step ends here on the device."""
        if drafted.verifying is not None:
            drafted.verifying.end()
        if not batch.goes_on:
            return
        if any(map(len, drafted.drafts)):
            self._drafters.begin_next(batch, drafted.drafts, chosen)
        elif self._target_forward is not None:
            self._target_forward.begin_next(step, chosen)

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_rows]
        positions: torch.Tensor,  # [num_rows]
        attention: AttentionContext,
        keep: torch.Tensor | None = None,  # [num_kept] rows whose logits are wanted; None: all
    ) -> torch.Tensor:
        """Logits [num_kept, this rank's share of the vocabulary] of one packed forward."""
        return self._model.forward(token_ids, positions, attention, keep)
