"""The drafters of one rank, by the names that requests know them by, and the memory they take."""

from dataclasses import replace

import torch

from magicdec.config import ConfigError, EngineConfig
from magicdec.drafters.base import Drafter, Forward, Propose
from magicdec.drafters.draft_model import DraftCache, DraftModel, DraftModelDrafter
from magicdec.drafters.draft_pages import DraftPages
from magicdec.drafters.draft_rings import DraftRings, RingShape
from magicdec.drafters.ngram import NgramDrafter
from magicdec.drafters.self_draft import POLICIES, SelfDrafter
from magicdec.drafters.top_k import TopKDrafter
from magicdec.graphs.draft_graphs import DraftGraphs
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kv_cache import LayerSpec, PagedKVCache, bytes_per_token, num_affordable_blocks


def build_drafters(
    forward: Forward,
    propose: Propose,
    cache: PagedKVCache,
    backend: AttentionBackend,
    config: EngineConfig,
    vocab_size: int,  # of the target's logits
    draft_model: DraftModel | None,
    propose_by_model: Propose,  # the draft model's logits are whole, the target's a rank's share
    graphs: DraftGraphs | None,  # of the target's draft steps
) -> dict[str, Drafter]:
    """Drafter name -> drafter; several names may be one's. `cache` holds the target's pages."""
    selection = config.speculation.selection
    budget = config.speculation.selection_budget
    self_drafter = SelfDrafter(forward, propose, cache, backend, selection, budget, graphs)
    drafters: dict[str, Drafter] = {
        **dict.fromkeys(POLICIES, self_drafter),
        "top_k": TopKDrafter(forward, propose, cache),
        "ngram": NgramDrafter(),
    }
    if draft_model is not None:
        draft_cache = _draft_cache(draft_model, cache, backend, config)
        drafters["draft_model"] = DraftModelDrafter(
            draft_model, propose_by_model, draft_cache, vocab_size
        )
    return drafters


def num_blocks_beside_draft(
    layers: tuple[LayerSpec, ...],
    draft_model: DraftModel | None,
    dtype: torch.dtype,
    config: EngineConfig,
) -> int:
    """Whole blocks within the rank's memory, the draft model's K/V counted.

    With all of its K/V kept, a block holds those too; rings are taken off before. Raises
    ConfigError when not even one block fits.
    """
    if draft_model is None or config.cache.num_blocks is not None:
        return num_affordable_blocks(layers, dtype, config.cache)
    shape = _ring_shape(config)
    if shape is None:
        return num_affordable_blocks(layers + draft_model.layers, dtype, config.cache)
    num_rings, set_bytes = config.scheduler.max_num_seqs, config.cache.pool_bytes
    ring_bytes = _ring_bytes(draft_model, shape, dtype, num_rings)
    if ring_bytes >= set_bytes:
        raise ConfigError(
            f"kv_cache_bytes must be above {ring_bytes}, what the draft model's windows of "
            f"max_num_seqs {num_rings} sequences take, got {set_bytes}"
        )
    rest = replace(config.cache, kv_cache_bytes=set_bytes - ring_bytes)
    return num_affordable_blocks(layers, dtype, rest)


def pool_bytes(
    layers: tuple[LayerSpec, ...],
    draft_model: DraftModel | None,
    dtype: torch.dtype,
    config: EngineConfig,
    num_blocks: int,
) -> int:
    """What so many blocks take on this rank, with the draft model's K/V."""
    num_tokens = num_blocks * config.cache.block_size
    target_bytes = num_tokens * bytes_per_token(layers, dtype)
    if draft_model is None:
        return target_bytes
    shape = _ring_shape(config)
    if shape is None:
        return target_bytes + num_tokens * bytes_per_token(draft_model.layers, dtype)
    return target_bytes + _ring_bytes(draft_model, shape, dtype, config.scheduler.max_num_seqs)


def _ring_bytes(
    draft_model: DraftModel, shape: RingShape, dtype: torch.dtype, num_rings: int
) -> int:
    return num_rings * shape.num_slots * bytes_per_token(draft_model.layers, dtype)


def _draft_cache(
    draft_model: DraftModel, cache: PagedKVCache, backend: AttentionBackend, config: EngineConfig
) -> DraftCache:
    dtype, device = cache.k[0].dtype, cache.k[0].device
    shape = _ring_shape(config)
    if shape is None:
        pages = PagedKVCache(draft_model.layers, cache.block_size, cache.num_blocks, dtype, device)
        return DraftPages(pages, backend, "draft_model")
    num_slots = config.scheduler.max_num_seqs * shape.num_slots
    slots = PagedKVCache(draft_model.layers, 1, num_slots, dtype, device)
    return DraftRings(slots, shape, backend, config.speculation.selection)


def _ring_shape(config: EngineConfig) -> RingShape | None:
    """None where the draft model keeps all of its K/V."""
    draft = config.speculation.draft_model
    if draft is None or draft.window is None:
        return None
    return RingShape(draft.window, config.speculation.selection.num_sink_tokens)
