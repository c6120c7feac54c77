"""Tiny random models whose shards are awkward: uneven heads, no heads, tied heads, experts."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.conftest import EOS, VOCAB_SIZE

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 704,  # 11 grains of 64: never split evenly
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}

SHARDABLE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "smollm2": lambda: LlamaConfig(**SHAPE | _SMOLLM2 | {"tie_word_embeddings": True}),
    "multi_query": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 1}),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=16, query_pre_attn_scalar=32),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        sliding_window=16,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "glm4": lambda: Glm4Config(**SHAPE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}

# Name -> configuration, the module that is named, a word of the reason.
REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str, str]] = {
    "phi3": (lambda: Phi3Config(**SHAPE), "model.layers.0.self_attn.qkv_proj", "fused"),
    "gpt2": (
        lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB_SIZE),
        "transformer.h.0.attn.c_attn",
        "fused",
    ),
    "gpt_neox": (
        lambda: GPTNeoXConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=VOCAB_SIZE,
        ),
        "gpt_neox.layers.0.attention.query_key_value",
        "fused",
    ),
    "olmo2": (lambda: Olmo2Config(**SHAPE), "model.layers.0.self_attn.q_norm.weight", "all heads"),
    "gpt_oss": (
        lambda: GptOssConfig(**SHAPE, num_local_experts=4),
        "model.layers.0.self_attn.sinks",
        "all heads",
    ),
}
