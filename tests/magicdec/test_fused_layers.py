"""Where one kernel rotates and stores, pages, queries and logits are those of two kernels in turn;
rows that no pages are for go to none."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.attention import PagedAttention, row_positions
from magicdec.config import SelectionConfig
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.fused_layers import FusedAttention
from magicdec.fused_modules import fuse_modules
from magicdec.graphs.forward_graphs import static_forward
from magicdec.graphs.forward_inputs import ForwardInputs, Shape
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.triton_steps import TritonElementwise
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from tests.conftest import FAMILIES
from tests.kernels.layouts import make_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
CONTEXT_LENS, QUERY_LENS = [20, 0], [1, 3]
SHAPE = Shape(bucket=2, tier=3, num_columns=4)
FUSED = ["llama", "qwen3"]  # without norms of heads, and with them


class InTwoLaunches(TritonElementwise):
    rotate_and_store = None  # type: ignore[assignment]


def loaded(family: str, kernels: TritonElementwise | None) -> LoadedModel:
    config = FAMILIES[family]()
    config.head_dim = 32
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    if kernels is not None:
        fuse_modules(module, kernels)
        assert any(isinstance(child, FusedAttention) for child in module.modules())
    return describe_model(module, "float32")


def both_ways(family: str) -> list[LoadedModel]:
    kinds = (TritonElementwise, InTwoLaunches)
    return [loaded(family, kind(DEVICE, torch.float32)) for kind in kinds]


def made_up(model: LoadedModel, dtype: torch.dtype) -> tuple[PagedKVCache, PagedLayout]:
    layout, num_blocks = make_layout(CONTEXT_LENS, QUERY_LENS, BLOCK_SIZE, False, 0)
    cache = PagedKVCache(model.layers, BLOCK_SIZE, num_blocks, dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for pages in (*cache.k, *cache.v):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    return cache, layout


@dataclass
class Queries:
    """An observer that keeps what it is shown of all rows."""

    num_sequences: int = len(QUERY_LENS)
    seen: list[torch.Tensor] = field(default_factory=list)

    def over(self, sequences: Sequence[int], layout: PagedLayout) -> "Queries":
        return self

    def rows(self, starts: Sequence[int]) -> list[slice]:
        return [slice(s, s + n) for s, n in zip(starts, QUERY_LENS, strict=True)]

    def observe(
        self,
        layer: int,
        queries: Sequence[torch.Tensor],
        k_cache: torch.Tensor,
        **limits: float | int | None,
    ) -> None:
        self.seen += [*queries, k_cache.clone()]

    def finish(self) -> None:
        """Nothing is left to do."""


def assert_same(found: list[list[torch.Tensor]]) -> None:
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_packed_forward_is_that_of_two_launches(family: str, dtype: torch.dtype) -> None:
    """Pages of the rows' dtype, and of another; nobody stores a second time."""
    found = []
    for model, is_one in zip(both_ways(family), (True, False), strict=True):
        cache, layout = made_up(model, dtype)
        backend, queries = triton_backend(), Queries()
        store = Mock(wraps=backend.store)
        attention = PagedAttention(cache, layout, replace(backend, store=store), [queries])
        logits = model.forward(torch.arange(sum(QUERY_LENS)), row_positions(layout), attention)
        assert store.call_count == (0 if is_one else len(model.layers))
        found.append([logits, *cache.k, *cache.v, *queries.seen])
    assert_same(found)


@torch.inference_mode()
@pytest.mark.parametrize("family", FUSED)
def test_a_captured_forward_is_that_of_two_launches(family: str) -> None:
    """Rows that are not there leave no trace in the pages."""
    found = []
    for model in both_ways(family):
        cache, layout = made_up(model, torch.float32)
        buffer = torch.zeros(sum(SHAPE.sizes), dtype=torch.int32)
        token_ids = torch.arange(sum(QUERY_LENS))
        ForwardInputs(SHAPE, buffer.numpy()).write(layout, token_ids.numpy(), token_ids.numpy())
        step = static_forward(model.forward, cache, triton_backend(), SHAPE, buffer.to(DEVICE))
        logits, queries = step(), Queries()
        step.attention.show([queries], [0, SHAPE.tier])
        found.append([logits[[0, 3, 4, 5]], *cache.k, *cache.v, *queries.seen])
    assert_same(found)


@torch.inference_mode()
@pytest.mark.parametrize("family", FUSED)
def test_a_drafts_rows_go_to_no_pages(family: str) -> None:
    """And get the logits of a model whose modules are its own."""
    logits = []
    for kernels in (None, TritonElementwise(DEVICE, torch.float32)):
        model = loaded(family, kernels)
        cache, _ = made_up(model, torch.float32)
        before = [pages.clone() for pages in (*cache.k, *cache.v)]
        layout, _ = make_layout(CONTEXT_LENS, [1, 1], BLOCK_SIZE, False, 0)
        config = SelectionConfig(num_sink_tokens=2, num_recent_tokens=4)
        views = DraftViews(layout, config, 2, [12, 12], [None, None])
        attention = DraftAttention(cache, triton_backend(), views)
        for step in range(2):
            token_ids = torch.tensor([step, 7 + step])
            logits.append(model.forward(token_ids, attention.begin_step(step), attention))
        assert_same([before, [*cache.k, *cache.v]])
    for expected, found in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
