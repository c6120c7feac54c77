"""A head that is split gives, over all ranks, the logits of the whole one."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, PretrainedConfig

from magicdec.attention import UnsupportedModel
from magicdec.cluster.vocabulary_head import SplitHead, find_head
from tests.cluster.shard_models import SHAPE, SHARDABLE

INPUT = torch.arange(6)[None]
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "untied": SHARDABLE["llama"],
    "tied": SHARDABLE["llama_tied"],
    "softcap": SHARDABLE["gemma2"],
    "scaled and tied": lambda: CohereConfig(
        **SHAPE | {"tie_word_embeddings": True, "logit_scale": 0.3}
    ),
    "uneven": lambda: LlamaConfig(**SHAPE | {"vocab_size": 301}),
}


def made(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return module


def with_bias(module: nn.Module) -> nn.Module:
    _, head = find_head(module)
    head.bias = nn.Parameter(torch.randn(head.out_features))
    return module


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_of_all_ranks_side_by_side_are_the_whole_heads(name: str, has_bias: bool) -> None:
    parts = []
    for rank in range(3):
        module = with_bias(made(MODELS[name]())) if has_bias else made(MODELS[name]())
        whole = module(INPUT).logits
        head = SplitHead.detach(module, 3, rank)
        head.attach(module)
        parts.append(module(INPUT).logits)
        assert parts[-1].shape[-1] == head.vocabulary.shares[rank]
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-5, atol=1e-5)


def test_rows_of_a_tied_head_are_the_embeddings_own_and_others_hold_on_to_nothing_else() -> None:
    tied, untied = made(MODELS["tied"]()), made(MODELS["untied"]())
    for module in (tied, untied):
        SplitHead.detach(module, 2, 1).attach(module)
    embedding = tied.get_submodule("model.embed_tokens").get_parameter("weight")
    rows = find_head(tied)[1].weight
    assert rows.data_ptr() == embedding[192].data_ptr()
    assert find_head(untied)[1].weight.untyped_storage().nbytes() == 192 * 256 * 4


def test_nothing_is_left_where_autotp_looks_for_a_head() -> None:
    module = made(MODELS["untied"]())
    SplitHead.detach(module, 2, 0)
    assert [p for n, p in module.named_parameters() if "lm_head" in n] == []


def test_a_head_that_is_no_linear_is_refused() -> None:
    module = made(MODELS["untied"]())
    module.set_submodule("lm_head", nn.Identity())
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: the output head is a Identity"):
        find_head(module)
