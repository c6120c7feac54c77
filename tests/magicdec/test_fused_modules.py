"""Fused layers compute what transformers' own do, and what differs is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GlmConfig, OlmoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.compiled_layers import CompiledDecoderLayer, compile_layers
from magicdec.fused_layers import FusedAttention, FusedDecoderLayer, FusedMlp, FusedRmsNorm
from magicdec.fused_modules import fuse_modules
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_linear import pack_linears
from magicdec.kernels.heads import Heads
from magicdec.kernels.layer_dispatch import select_elementwise
from magicdec.model_loader import LoadedModel, describe_model
from tests.conftest import FAMILIES

LIBRARY = compiled_library()
HOST = torch.device("cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no compiler here")
NUM_LAYERS = 3
ALL = (FusedRmsNorm, FusedMlp, FusedAttention, FusedDecoderLayer)
# Gates other than silu are not fused.
FUSED = {
    "llama": ALL,
    "mistral_sliding": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma2": (FusedRmsNorm, FusedAttention),
    "gemma3": (FusedRmsNorm, FusedAttention),
    "glm": (FusedRmsNorm,),
    "olmo": (FusedMlp,),
}


class Sums:
    """An attention context whose answer depends on all that it is given."""

    def attend(
        self,
        layer: int,
        heads: Heads,
        **limits: float | int | None,
    ) -> torch.Tensor:
        query, key, value = heads.rotated()
        per_head = len(query) // len(key)
        scale = sum(limit for limit in limits.values() if limit is not None)
        return (query + (key * value).repeat_interleave(per_head, dim=0)) * scale / 100 + layer


SHAPE = vars(FAMILIES["llama"]())
# A rotation of half a head, and a clamp that rows of usual size do not meet.
OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "glm": lambda: GlmConfig(**_shape(), pad_token_id=None),
    "olmo": lambda: OlmoConfig(**_shape(), clip_qkv=50.0),
}


def _shape() -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    return {name: SHAPE[name] for name in (*names, *heads)}


def made(family: str) -> Any:
    """With heads wide enough for the kernels."""
    config: PretrainedConfig = {**FAMILIES, **OTHERS}[family]()
    config.head_dim = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms' weights would all be 1, and biases 0
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def logits(model: LoadedModel) -> torch.Tensor:
    token_ids = torch.arange(40) % 17
    with torch.inference_mode():
        return model.forward(token_ids, torch.arange(40), Sums())


def fuse(module: Any) -> None:
    kernels = select_elementwise(HOST, module.dtype)
    assert kernels is not None
    fuse_modules(module, kernels)


def kinds(module: nn.Module) -> set[type[nn.Module]]:
    return {type(child) for child in module.modules()} & set(ALL)


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_model_gives_the_models_logits(family: str) -> None:
    assert LIBRARY is not None
    module = made(family)
    before = describe_model(module, "float32")
    expected = logits(before)
    fuse(module)
    after = describe_model(module, "float32")
    torch.testing.assert_close(logits(after), expected, atol=1e-3, rtol=1e-3)
    assert kinds(module) == set(FUSED[family])
    assert after.layers == before.layers
    packed = [child for child in module.modules() if type(child) is nn.Linear]
    pack_linears(module, LIBRARY)
    assert packed and not any(type(child) is nn.Linear for child in module.modules())
    before_compiling = logits(after)
    compile_layers(module, LIBRARY)
    compiled = [child for child in module.modules() if type(child) is CompiledDecoderLayer]
    assert len(compiled) == (NUM_LAYERS if FusedDecoderLayer in FUSED[family] else 0)
    torch.testing.assert_close(logits(after), before_compiling, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2", "qwen3"])
def test_a_bfloat16_model_is_fused_too(family: str) -> None:
    module = made(family).bfloat16()
    expected = logits(describe_model(module, "bfloat16"))
    fuse(module)
    assert kinds(module) == set(FUSED[family])
    found = logits(describe_model(module, "bfloat16"))
    differences = (found - expected).abs()
    assert float(differences.mean()) < 2**-8 * float(expected.abs().max())


def test_a_norm_that_rounds_elsewhere_stays_in_bfloat16() -> None:
    """Gemma multiplies with its weight before it rounds."""
    module = made("gemma2").bfloat16()
    fuse(module)
    assert FusedRmsNorm not in kinds(module)


def test_modules_that_compute_something_else_stay() -> None:
    module = made("llama")
    first, second, third = module.model.layers
    own, whole = second.self_attn.forward, first.forward
    first.forward = lambda *args, **kwargs: 0.5 * whole(*args, **kwargs)
    second.self_attn.forward = lambda *args, **kwargs: [2 * own(*args, **kwargs)[0], None]
    first.mlp.act_fn = nn.ReLU()
    third.input_layernorm.forward = lambda rows: rows
    expected = logits(describe_model(module, "float32"))
    fuse(module)
    assert not isinstance(second.self_attn, FusedAttention)
    assert not isinstance(first.mlp, FusedMlp)
    assert not isinstance(third.input_layernorm, FusedRmsNorm)
    assert isinstance(first.self_attn, FusedAttention)
    are_fused = [type(layer) is FusedDecoderLayer for layer in module.model.layers]
    assert are_fused == [False, False, True]
    found = logits(describe_model(module, "float32"))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_sizes_that_the_kernels_do_not_know_stay() -> None:
    config = FAMILIES["llama"]()
    config.head_dim, config.hidden_size, config.intermediate_size = 16, 72, 120
    module = AutoModelForCausalLM.from_config(config).eval()
    fuse(module)
    assert kinds(module) == set()
