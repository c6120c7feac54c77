"""What a graph captures computes the packed forward's logits, and could be captured: it reads
nothing on the host, and no tensor that a later replay would not find."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.attention import PagedAttention, row_positions
from magicdec.graphs.forward_graphs import StaticForward, static_forward
from magicdec.graphs.forward_inputs import ForwardInputs, Shape
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from tests.conftest import FAMILIES
from tests.kernels.layouts import make_layout
from tests.magicdec.graphs.captured_region import CapturedRegion, Forbidden, tensors_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = triton_backend()
BLOCK_SIZE = 16
SHAPE = Shape(bucket=4, tier=5, num_columns=8)
# More sequences than there are, and rows: a plain one, a whole draft and a shorter one.
CONTEXT_LENS, QUERY_LENS = [70, 33, 0], [1, 5, 3]


@pytest.fixture(params=["llama", "gemma2", "mistral_sliding"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(FAMILIES[request.param]())
    return describe_model(module.to(DEVICE), "float32")


def made_up(model: LoadedModel) -> tuple[PagedKVCache, PagedLayout, torch.Tensor]:
    layout, num_blocks = make_layout(CONTEXT_LENS, QUERY_LENS, BLOCK_SIZE, False, 0)
    cache = PagedKVCache(model.layers, BLOCK_SIZE, num_blocks, torch.float32, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for pages in (*cache.k, *cache.v):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    token_ids = torch.randint(model.vocab_size, (sum(QUERY_LENS),), generator=generator)
    return cache, layout, token_ids


def static(model: LoadedModel, cache: PagedKVCache) -> tuple[StaticForward, torch.Tensor]:
    buffer = torch.zeros(sum(SHAPE.sizes), dtype=torch.int32, device=DEVICE)
    return static_forward(model.forward, cache, BACKEND, SHAPE, buffer), buffer


@torch.inference_mode()
def test_ragged_rows_get_the_packed_forwards_logits(model: LoadedModel) -> None:
    """And leave the same pages behind."""
    cache, layout, token_ids = made_up(model)
    other, _, _ = made_up(model)
    attention = PagedAttention(cache, layout, BACKEND)
    expected = model.forward(token_ids, row_positions(layout), attention)
    step, buffer = static(model, other)
    words, keep = np.zeros(len(buffer), dtype=np.int32), np.arange(len(token_ids))
    inputs = ForwardInputs(SHAPE, words)
    for _ in range(2):  # the second time over what the first one left
        inputs.write(layout, token_ids.numpy(), keep)
        buffer.copy_(torch.from_numpy(words))
        found = step().index_select(0, step.kept[: len(keep)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip((*other.k, *other.v), (*cache.k, *cache.v), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_step_could_be_captured(model: LoadedModel) -> None:
    cache, _, _ = made_up(model)
    step, _ = static(model, cache)
    with CapturedRegion([*tensors_of(model, cache), *step.static]):
        step()


@torch.inference_mode()
def test_the_region_fails_on_what_a_replay_cannot_do(model: LoadedModel) -> None:
    cache, layout, token_ids = made_up(model)
    known = tensors_of(model, cache)
    attention = PagedAttention(cache, layout, BACKEND)
    with pytest.raises(Forbidden), CapturedRegion(known):
        model.forward(token_ids, row_positions(layout), attention)
    with pytest.raises(Forbidden, match="not static"), CapturedRegion(known):
        token_ids + 1
    with pytest.raises(Forbidden, match="item in"), CapturedRegion(known):
        cache.k[0].sum().item()
    with pytest.raises(Forbidden, match="nonzero"), CapturedRegion(known):
        cache.k[0].nonzero()
