"""A round whose tokens the device chooses drafts what the host would, in one copy each way."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.batch import DraftChoice, ScheduledSequence
from magicdec.config import SelectionConfig
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.drafters.self_draft import draft_layout, draft_steps, replay_steps
from magicdec.drafts import fetch
from magicdec.graphs.draft_graphs import DraftGraphs, DraftRound
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.gumbel import Winners
from magicdec.kernels.triton_gumbel import gumbel_argmax
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import OptimalCoupling, SharedNoise, VerificationRule
from tests.conftest import FAMILIES
from tests.kernels.layouts import make_layout
from tests.magicdec.graphs.captured_region import tensors_of
from tests.magicdec.graphs.eager_capturer import EagerCapturer
from tests.magicdec.graphs.host_copies import HostCopies

if torch.cuda.is_available():
    pytest.skip("copies are counted where host and device are one", allow_module_level=True)

DEVICE = torch.device("cpu")
BACKEND = triton_backend()
CONFIG = SelectionConfig(num_sink_tokens=2, num_recent_tokens=4)
BLOCK_SIZE, BUDGET = 16, 24
GREEDY = SamplingParams(temperature=0.0, top_p=0.5, max_tokens=64)  # greedy, whatever the nucleus
COLD = SamplingParams(temperature=0.3, seed=7, max_tokens=64)
HOT = SamplingParams(temperature=1.7, seed=2**64 - 1, max_tokens=64)  # a seed beyond int64
NUCLEUS = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=64)
Drafts = list[tuple[Proposal, ...]]


def small_model() -> LoadedModel:
    """One layer and KV head: triton's interpreter takes 30 ms a program."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = config.num_key_value_heads = 1
    module: Any = AutoModelForCausalLM.from_config(config)
    return describe_model(module, "float32")


class Case:
    """Rounds over pages that hold noise: contexts are where a round stands."""

    def __init__(self, rule: type[Any] = SharedNoise) -> None:
        self.model = small_model()
        self.rule: VerificationRule = rule(Sampler((), gumbel_argmax))
        _, num_blocks = make_layout([90, 90, 90], [1, 1, 1], BLOCK_SIZE, False, 0)
        self.cache = PagedKVCache(self.model.layers, BLOCK_SIZE, num_blocks, torch.float32, DEVICE)
        generator = torch.Generator().manual_seed(0)
        for pages in (*self.cache.k, *self.cache.v):
            pages.copy_(torch.randn(pages.shape, generator=generator))
        self.capturer = EagerCapturer(DEVICE, tensors_of(self.model, self.cache))
        self.graphs = DraftGraphs(
            self.model.forward,
            self.model.layers,
            self.cache,
            BACKEND,
            self.capturer,
            90,
            self.rule.only_scales,
            self.model.vocabulary,
        )

    def sequences(
        self, contexts: list[int], lengths: list[int], sampling: list[SamplingParams]
    ) -> list[ScheduledSequence]:
        layout, _ = make_layout(contexts, [9] * len(contexts), BLOCK_SIZE, False, 0)
        return [
            ScheduledSequence(
                sequence_id=i,
                token_ids=np.array([10 + 3 * i]),
                num_computed_tokens=contexts[i],
                block_table=layout.block_tables[i],
                sampling=params,
                num_prompt_tokens=5,
                history=None,
                draft=DraftChoice("streaming", lengths[i], BUDGET, needs_history=False),
            )
            for i, params in enumerate(sampling)
        ]

    def views(self, sequences: list[ScheduledSequence]) -> DraftViews:
        layout, batch = draft_layout(sequences, BLOCK_SIZE), len(sequences)
        num_steps = max(s.draft_length for s in sequences)
        return DraftViews(layout, CONFIG, num_steps, [BUDGET] * batch, [None] * batch)

    def attention(self, sequences: list[ScheduledSequence]) -> DraftAttention:
        return DraftAttention(self.cache, BACKEND, self.views(sequences))

    def on_the_host(self, sequences: list[ScheduledSequence]) -> Drafts:
        attention = self.attention(sequences)
        return draft_steps(sequences, attention, self.model.forward, self.rule.propose)

    def begin(self, sequences: list[ScheduledSequence]) -> tuple[list[SamplerRow], DraftRound]:
        rows = [SamplerRow.after(s, ()) for s in sequences]
        replayed = self.graphs.begin(self.views(sequences), rows)
        assert replayed is not None
        return rows, replayed

    def on_the_device(self, sequences: list[ScheduledSequence]) -> Drafts:
        rows, replayed = self.begin(sequences)
        assert replayed.chooses
        return [tuple(draft) for draft in replay_steps(sequences, rows, replayed)]


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [[GREEDY] * 3, [HOT, COLD, HOT], [COLD, GREEDY, HOT]])
def test_the_device_drafts_what_the_host_does(sampling: list[SamplingParams]) -> None:
    """Ragged lengths, in a bucket of four; rounds share one graph, and what it was left with."""
    case = Case()
    drafted = []
    for contexts, lengths in (([70, 9, 40], [2, 4, 1]), ([72, 14, 41], [2, 1, 3])):
        sequences = case.sequences(contexts, lengths, sampling)
        expected = case.on_the_host(sequences)
        assert case.on_the_device(sequences) == expected
        assert [len(draft) for draft in expected] == lengths
        drafted += [p.token_id for draft in expected for p in draft]
    assert len(set(drafted)) > 5
    assert case.capturer.replays["StaticDraftStep"] == 4 + 3


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_full_buckets_draft_what_the_host_does(batch: int) -> None:
    case = Case()
    sequences = case.sequences([70, 9][:batch], [3, 2][:batch], [HOT, COLD][:batch])
    assert case.on_the_device(sequences) == case.on_the_host(sequences)


@torch.inference_mode()
def test_a_rounds_rows_are_one_copy_and_its_drafts_come_back_with_what_is_chosen() -> None:
    case = Case()
    sequences = case.sequences([70, 9], [1, 3], [COLD, HOT])
    expected = case.on_the_host(sequences)
    rows, replayed = case.begin(sequences)
    (captured,) = case.graphs._captured.values()
    winners = Winners(torch.zeros(6, dtype=torch.float64), torch.arange(6))
    static = [*captured.step.static, captured.logits, winners.values, winners.entries]
    with HostCopies(static) as copies:
        drafts = replay_steps(sequences, rows, replayed)
        assert [len(draft) for draft in drafts] == [1, 3]
        assert (copies.to_device, copies.to_host) == (["copy_"], [])
        assert fetch(winners, [(), *drafts]) == list(range(6))
        assert [tuple(draft) for draft in drafts] == expected
    assert (copies.to_device, copies.to_host) == (["copy_"], ["tolist"])
    assert case.capturer.replays["StaticDraftStep"] == 3


@torch.inference_mode()
def test_steps_from_the_host_go_there_each_time() -> None:
    """The count above would see them; and rounds that the host chooses in share the graphs."""
    case = Case()
    sequences = case.sequences([70, 9], [3, 2], [NUCLEUS, GREEDY])
    expected = case.on_the_host(sequences)
    _, replayed = case.begin(sequences)
    assert not replayed.chooses
    (captured,) = case.graphs._captured.values()
    attention = case.attention(sequences)
    with HostCopies([*captured.step.static, captured.logits]) as copies:
        assert draft_steps(sequences, attention, replayed, case.rule.propose) == expected
    assert len(copies.to_device) >= 3 and len(copies.to_host) >= 3
    plain = case.sequences([70, 9], [3, 2], [HOT, GREEDY])
    assert case.on_the_device(plain) == case.on_the_host(plain)
    assert len(case.graphs._captured) == 1


@torch.inference_mode()
def test_what_the_device_does_not_choose() -> None:
    case = Case()
    for sampling in (
        NUCLEUS,
        SamplingParams(temperature=0.8, top_k=5),
        SamplingParams(temperature=0.8, min_p=0.1),
        SamplingParams(temperature=0.0, presence_penalty=1.0),
        SamplingParams(temperature=0.0, logit_bias=((3, 1.0),)),
        SamplingParams(temperature=0.0, min_tokens=80, max_tokens=90),
    ):
        _, replayed = case.begin(case.sequences([70, 9], [3, 2], [GREEDY, sampling]))
        assert not replayed.chooses, sampling


@torch.inference_mode()
def test_optimal_coupling_keeps_the_laws_of_sampled_drafts() -> None:
    case = Case(OptimalCoupling)
    greedy = case.sequences([70, 9], [3, 2], [GREEDY, GREEDY])
    assert case.on_the_device(greedy) == case.on_the_host(greedy)
    _, replayed = case.begin(case.sequences([70, 9], [3, 2], [GREEDY, HOT]))
    assert not replayed.chooses


@torch.inference_mode()
def test_scores_that_hold_a_nan_are_refused() -> None:
    case = Case()
    sequences = case.sequences([70, 9], [3, 2], [COLD, GREEDY])
    first = int(sequences[1].block_table[0]) * BLOCK_SIZE
    case.cache.v[0][:, first] = float("nan")
    with pytest.raises(ValueError, match="row 1 of the scores holds a NaN"):
        case.on_the_host(sequences)
    with pytest.raises(ValueError, match="row 1 of the scores holds a NaN"):
        case.on_the_device(sequences)
