"""SmolLM2-135M-Instruct's GGUF file as a Hugging Face folder; `embedded_model` says where and when.

Read with the `gguf` package rather than with transformers' own GGUF reader, which parses the file
three times and leaves the digit rule out of the tokenizer.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_HEADS, NUM_KV_HEADS = 9, 3

# What the file's metadata says, in transformers' words.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": NUM_HEADS,
    "num_hidden_layers": 30,
    "num_key_value_heads": NUM_KV_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROTARY_HEADS = {"attn_q": NUM_HEADS, "attn_k": NUM_KV_HEADS}


def convert(gguf_path: Path, folder: Path, label: str) -> None:
    """Writes the model into an existing folder, with a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{label}: reading", total=None)
        reader = GGUFReader(gguf_path)
        progress.update(task, description=f"{label}: tokenizer")
        tokenizer = build_tokenizer(reader)
        progress.update(task, description=f"{label}: weights", total=len(reader.tensors))
        weights = dequantize_all(reader.tensors, lambda: progress.advance(task))
        progress.update(task, description=f"{label}: saving")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(field(reader, "tokenizer.chat_template"))
        for name, content in (
            ("config.json", CONFIG),
            ("generation_config.json", GENERATION_CONFIG),
            ("tokenizer_config.json", TOKENIZER_CONFIG),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # a cache may serve several users
        progress.update(task, description=f"{label}: converted")


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """GPT-2's byte-level BPE after single digits: what the file calls the "smollm" rule."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    return tokenizer


def dequantize_all(
    tensors: Sequence[ReaderTensor], on_tensor: Callable[[], object]
) -> dict[str, torch.Tensor]:
    weights = {}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        name, num_rotary_heads = hugging_face_name(tensor.name)
        if num_rotary_heads:
            weight = to_half_split(weight, num_rotary_heads)
        weights[name] = weight.to(torch.bfloat16).contiguous()
        on_tensor()
    return weights


def hugging_face_name(gguf_name: str) -> tuple[str, int]:
    """The parameter's name, and the heads whose rotary pairs it holds (0: none)."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name)
    if match is None:
        raise ValueError(f"unexpected tensor {gguf_name!r} in the GGUF file")
    layer, part = match.groups()
    prefix = "model.layers." + layer + "." if layer else ""
    return f"{prefix}{TENSOR_NAMES[part]}.weight", ROTARY_HEADS.get(part, 0)


def to_half_split(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotary pairs are neighbours in a GGUF file, and half a head apart in transformers."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(weight.shape)
