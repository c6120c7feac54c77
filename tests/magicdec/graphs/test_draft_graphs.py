"""A draft step as a graph captures it gives the logits of the steps that are not, and could be
captured."""

from dataclasses import replace
from threading import Lock
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.config import SelectionConfig
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.graphs.capture import Capturer
from magicdec.graphs.draft_graphs import MAX_STEPS, DraftGraphs, StaticDraftStep
from magicdec.graphs.draft_inputs import DraftInputs
from magicdec.graphs.view_inputs import ViewInputs
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.gumbel import Winners
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from magicdec.sampler import SamplerRow
from magicdec.sparse_kv import Selection
from magicdec.types import SamplingParams
from magicdec.vocabulary import Vocabulary, even_bounds
from tests.conftest import FAMILIES
from tests.kernels.layouts import make_layout
from tests.magicdec.graphs.captured_region import CapturedRegion, tensors_of
from tests.magicdec.graphs.eager_capturer import EagerCapturer
from tests.ranks import ThreadRanks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = triton_backend()
CONFIG = SelectionConfig(num_sink_tokens=2, num_recent_tokens=4)
BLOCK_SIZE, NUM_STEPS, BUDGET = 16, 3, 24
CONTEXT_LENS = [70, 9, 40]  # the second one's view is all of it


def loaded(family: str) -> LoadedModel:
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(FAMILIES[family]())
    return describe_model(module.to(DEVICE), "float32")


def made_up(model: LoadedModel) -> tuple[PagedKVCache, DraftViews]:
    """The third sequence has a selection, of other positions in every layer and head."""
    layout, num_blocks = make_layout(CONTEXT_LENS, [1, 1, 1], BLOCK_SIZE, False, 0)
    cache = PagedKVCache(model.layers, BLOCK_SIZE, num_blocks, torch.float32, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for pages in (*cache.k, *cache.v):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    selection = Selection(CONTEXT_LENS[2])
    for layer, spec in enumerate(model.layers):
        orders = [torch.randperm(30, generator=generator)[:10] for _ in range(spec.num_kv_heads)]
        ranked = (torch.stack(orders) + 2).to(DEVICE)
        selection.add((layer,), ranked[None], [ranked.shape[1]])
    budgets, selections = [BUDGET] * 3, [None, None, selection]
    return cache, DraftViews(layout, CONFIG, NUM_STEPS, budgets, selections)


def graphs_of(
    model: LoadedModel, cache: PagedKVCache, vocabulary: Vocabulary | None = None
) -> DraftGraphs:
    capturer = Capturer(DEVICE)
    limits = 90, lambda rows: True, vocabulary or model.vocabulary
    return DraftGraphs(model.forward, model.layers, cache, BACKEND, capturer, *limits)


def step_over(model: LoadedModel, cache: PagedKVCache, views: DraftViews) -> StaticDraftStep:
    step = graphs_of(model, cache).static_step(bucket=4, width=256)
    inputs = ViewInputs(cache, EagerCapturer(DEVICE), 4, 8)
    assert inputs.write(views) == BUDGET - NUM_STEPS
    step.views.fill(inputs.send(views))
    return step


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_steps_give_the_logits_of_steps_that_are_not_captured(family: str) -> None:
    model = loaded(family)
    cache, views = made_up(model)
    attention, step = DraftAttention(cache, BACKEND, views), step_over(model, cache, views)
    generator = torch.Generator().manual_seed(1)
    for number in range(NUM_STEPS):
        token_ids = torch.randint(model.vocab_size, (3,), generator=generator)
        positions = attention.begin_step(number)
        expected = model.forward(token_ids, positions, attention)
        step.inputs.write_step(number, token_ids, positions)
        torch.testing.assert_close(step()[:3], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_step_could_be_captured() -> None:
    model = loaded("llama")
    cache, views = made_up(model)
    step = step_over(model, cache, views)
    with CapturedRegion([*tensors_of(model, cache), *step.static]):
        step()


@torch.inference_mode()
def test_ranks_that_share_a_vocabulary_choose_what_one_rank_does() -> None:
    """Greedy, and with noise."""
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = [SamplerRow(SamplingParams(temperature=t, seed=9), 71, None, 4) for t in (0.0, 0.7, 1.3)]
    model, one_at_a_time = loaded("llama"), Lock()

    def chosen_by(vocabulary: Vocabulary) -> list[int]:
        cache, _ = made_up(model)
        step = graphs_of(model, cache, vocabulary).static_step(bucket=4, width=256)
        mine = logits[:, vocabulary.start : vocabulary.stop]
        staging = DraftInputs(torch.empty(DraftInputs.num_words(4), dtype=torch.int64))
        staging.write([0] * 3, list(CONTEXT_LENS), [90] * 3, rows)
        step.inputs.words.copy_(staging.words)

        def choose(scores: torch.Tensor, keys: torch.Tensor, first_entry: int = 0) -> Winners:
            with one_at_a_time:  # triton's interpreter knows no threads
                return step.choose(scores, keys, first_entry)

        replace(step, forward=lambda *inputs: mine, choose=choose)()
        return step.drafted[0, :3].tolist()

    whole = chosen_by(Vocabulary.whole(700))
    assert len(set(whole)) > 1
    assert ThreadRanks(even_bounds(700, 3)).run(chosen_by) == [whole] * 3


@torch.inference_mode()
def test_what_a_graph_does_not_hold_is_left_to_others() -> None:
    """Windows, which move with a step; and more steps than there are columns."""
    for family, num_steps in (("mistral_sliding", NUM_STEPS), ("llama", MAX_STEPS + 1)):
        model = loaded(family)
        cache, views = made_up(model)
        views = replace(views, draft_length=num_steps)
        rows = [SamplerRow(SamplingParams(), 71, None, 4)]
        assert graphs_of(model, cache).begin(views, rows) is None
