"""Tiny random models of every family, and engines over them that are checked after each test."""

import os

# Read where triton and its kernels are defined, so before any import of theirs: with no GPU they
# run in triton's interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from magicdec.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts

# Tiny matrices gain nothing from a second thread, and a busy machine makes it costly.
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

VOCAB_SIZE = 384
EOS = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "mistral_sliding": lambda: MistralConfig(**_SHAPE, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**_SHAPE, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then `<eos>`; ids above are never produced from text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_model(path, FAMILIES[family]())

    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(model_dirs: Callable[[str], Path]) -> Path:
    return model_dirs("llama")


def engine_config(
    path: Path,
    *,
    draft_length: int = 0,
    draft_budget: int = 24,
    num_sink_tokens: int = 4,
    num_blocks: int = 64,
    block_size: int = 8,
    max_batch_tokens: int = 64,
    max_num_seqs: int = 8,
    dtype: str = "float32",
    drafter: str = "streaming",
    refresh_rounds: int = 2,
    prefix_caching: bool = True,
    **speculation: Any,
) -> EngineConfig:
    """A small fp32 engine: every limit low enough to be met in a test."""
    return EngineConfig(
        model=ModelConfig(str(path), dtype),
        cache=CacheConfig(
            block_size=block_size, num_blocks=num_blocks, prefix_caching=prefix_caching
        ),
        scheduler=SchedulerConfig(max_num_seqs, max_batch_tokens),
        speculation=SpeculativeConfig(
            drafter=drafter,
            draft_length=draft_length,
            draft_budget=draft_budget,
            selection=SelectionConfig(
                num_sink_tokens=num_sink_tokens, num_recent_tokens=2, refresh_rounds=refresh_rounds
            ),
            **{"max_view_share": 1.0, **speculation},
        ),
    )


EngineFactory = Callable[[EngineConfig], Engine]


@pytest.fixture
def make_engine() -> Iterator[EngineFactory]:
    """Builds engines; after the test every one of them must be whole and empty."""
    engines: list[Engine] = []

    def make(config: EngineConfig) -> Engine:
        engine = Engine(
            config,
            LocalExecutor(config),
            load_tokenizer(config.model.path),
            read_model_facts(config.model.path),
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.check_integrity()
        assert engine.has_unfinished() or (
            engine.load().free_kv_tokens == engine.load().total_kv_tokens
        )
