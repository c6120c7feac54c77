"""What is refused or warned of before anything is loaded."""

import pickle

import pytest
from transformers import LlamaConfig

from magicdec.attention import UnsupportedModel
from magicdec.cluster.preflight import UnshardableModel, preflight
from tests.cluster.shard_models import REFUSED, SHAPE, SHARDABLE


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_split_is_refused_by_module_and_reason(name: str) -> None:
    config, module, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match="tensor_parallel_size 1") as caught:
        preflight(config(), 2)
    assert isinstance(caught.value, UnshardableModel)
    assert caught.value.module == module
    assert reason in caught.value.reason
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


@pytest.mark.parametrize("name", [*SHARDABLE, *REFUSED])
def test_one_rank_fits_everything(name: str) -> None:
    config = SHARDABLE[name] if name in SHARDABLE else REFUSED[name][0]
    report = preflight(config(), 1)
    assert report.warnings == () and report.replicated == ()


@pytest.mark.parametrize(
    ("name", "num_ranks", "query_heads", "kv_heads", "warning"),
    [
        ("llama", 2, (4, 4), (2, 2), None),
        ("llama", 3, (4, 2, 2), (2, 1, 1), "unevenly"),
        ("smollm2", 2, (6, 3), (2, 1), "unevenly"),
        ("multi_query", 2, (8, 0), (1, 0), "ranks [1] hold no attention head"),
        ("gemma3", 4, (2, 2, 2, 2), (1, 1, 1, 1), None),
    ],
)
def test_heads_by_rank(
    name: str,
    num_ranks: int,
    query_heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    warning: str | None,
) -> None:
    report = preflight(SHARDABLE[name](), num_ranks)
    assert report.query_heads == query_heads
    assert report.kv_heads == kv_heads
    assert report.replicated == ("model.embed_tokens.weight",)
    assert len(report.warnings) == (warning is not None)
    assert warning is None or warning in report.warnings[0]


def test_the_head_is_split_by_vocabulary_in_blocks_of_noise() -> None:
    shapes = preflight(LlamaConfig(**SHAPE | {"vocab_size": 100}), 3).shapes
    assert shapes["lm_head.weight"] == ((32, 256), (32, 256), (36, 256))
    with pytest.raises(UnshardableModel, match="lm_head: a vocabulary of 16 entries does not go"):
        preflight(LlamaConfig(**SHAPE | {"vocab_size": 16}), 3)


def test_experts_left_whole_are_named() -> None:
    report = preflight(SHARDABLE["qwen3_moe"](), 2)
    assert "model.layers.3.mlp.experts.down_proj" in report.replicated
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.warnings[0]
