"""A transformers model, as it is, whose attention reads our pages.

No model is written by hand: any decoder that dispatches through transformers' AttentionInterface
works, and one that does not is refused at load.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from magicdec.attention import (
    ATTENTION_NAME,
    AttentionContext,
    UnsupportedModel,
    register_attention,
)
from magicdec.checkpoint import load_module
from magicdec.compiled_layers import compile_layers
from magicdec.compute_dtype import compute_dtype, packing_library
from magicdec.config import ConfigError, EngineConfig, ModelConfig
from magicdec.fused_modules import fuse_modules
from magicdec.kernels.cpu_linear import PackedLinear, pack_linears
from magicdec.kernels.heads import Heads
from magicdec.kernels.layer_dispatch import select_elementwise
from magicdec.kernels.transfer import send
from magicdec.kv_cache import LayerSpec
from magicdec.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What scheduling needs to know of a model, read without its weights."""

    max_position_embeddings: int
    vocab_size: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module and its geometry. `kv_dtype` is the configured one; the module may compute wider."""

    module: nn.Module
    layers: tuple[LayerSpec, ...]
    vocabulary: Vocabulary  # of which its logits are this rank's share
    kv_dtype: torch.dtype
    device: torch.device

    @property
    def vocab_size(self) -> int:
        """Of the whole vocabulary."""
        return self.vocabulary.size

    @property
    def weight_element_bytes(self) -> int:
        """Of the linears, as a forward reads them."""
        packed = any(isinstance(child, PackedLinear) for child in self.module.modules())
        parameter: torch.Tensor = next(self.module.parameters())
        return torch.bfloat16.itemsize if packed else parameter.dtype.itemsize

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_rows]
        positions: torch.Tensor,  # [num_rows]
        attention: AttentionContext,
        keep: torch.Tensor | None = None,  # [num_kept] rows whose logits are wanted; None: all
    ) -> torch.Tensor:
        """Logits [num_kept, this rank's share of the vocabulary] of one packed forward."""
        output = self.module(
            input_ids=send(token_ids[None], self.device),
            position_ids=send(positions[None], self.device),
            use_cache=False,
            logits_to_keep=0 if keep is None else send(keep, self.device),
            attention_context=attention,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


class _Probe:
    """An attention context that only writes down what each layer asks of it."""

    def __init__(self) -> None:
        self.layers: list[LayerSpec] = []

    def attend(
        self,
        layer: int,
        heads: Heads,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        query, key, value = heads.rotated()
        if layer != len(self.layers):
            raise UnsupportedModel(f"attention layer {layer} ran as number {len(self.layers)}")
        if key.shape[-1] != value.shape[-1]:
            raise UnsupportedModel(
                f"layer {layer}: keys of {key.shape[-1]} and values of {value.shape[-1]} dimensions"
            )
        self.layers.append(LayerSpec(query.shape[0], key.shape[0], query.shape[2], sliding_window))
        return torch.zeros_like(query)


def resolve_checkpoint(path: str) -> Path:
    """The local folder of a Hugging Face folder or hub id (downloaded into the hub's cache)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(path, allow_patterns=patterns))


def read_model_facts(path: str) -> ModelFacts:
    """Reads config.json and generation_config.json. Raises UnsupportedModel without a context."""
    folder = resolve_checkpoint(path)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is None:
        raise UnsupportedModel(f"{path}: config.json has no max_position_embeddings")
    eos = config.eos_token_id
    if (folder / "generation_config.json").exists():
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
        eos = declared if declared is not None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ModelFacts(int(max_positions), int(config.vocab_size), frozenset(ids))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(path))
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_model(config: ModelConfig, device: torch.device) -> LoadedModel:
    """The whole model on one device; `cluster/tensor_parallel.py` loads shards.

    Raises CheckpointError for files that do not fit the model's config.json.
    """
    dtype = compute_dtype(config.dtype, device)
    module = load_module(resolve_checkpoint(config.path), dtype, device)
    if config.dtype == "bfloat16":  # fp32 models give transformers' own tokens
        kernels = select_elementwise(device, next(module.parameters()).dtype)
        if kernels is not None:
            fuse_modules(module, kernels)
    library = packing_library(config.dtype, device)
    if library is not None:
        pack_linears(module, library)
        compile_layers(module, library)
    return describe_model(module, config.dtype)


def load_draft_model(config: EngineConfig, device: torch.device) -> LoadedModel | None:
    """The whole draft model on this rank's device, sharded target or not; None: none is set.

    Raises ConfigError where it cannot draft for the target: another vocabulary, or fewer positions
    than are served.
    """
    draft = config.speculation.draft_model
    if draft is None:
        return None
    target = config.model
    served = target.max_model_len or read_model_facts(target.path).max_position_embeddings
    limit = read_model_facts(draft.path).max_position_embeddings
    if limit < served:
        raise ConfigError(
            f"draft model {draft.path} has {limit} positions, fewer than the {served} that "
            f"{target.path} is served with; lower max_model_len or take another draft model"
        )
    _refuse_another_vocabulary(target.path, draft.path)
    return load_model(ModelConfig(draft.path, target.dtype), device)


def _refuse_another_vocabulary(target: str, draft: str) -> None:
    """Drafted ids must mean the target's tokens. Logits may be padded differently."""
    words, others = load_tokenizer(target).get_vocab(), load_tokenizer(draft).get_vocab()
    differing = [
        word for word in words.keys() | others.keys() if words.get(word) != others.get(word)
    ]
    if not differing:
        return
    ids = {word: words.get(word, others.get(word, 0)) for word in differing}
    first = min(differing, key=lambda word: (ids[word], word))
    raise ConfigError(
        f"draft model {draft} has another vocabulary than {target}: {len(differing)} tokens "
        f"differ, first {first!r} (id {words.get(first)} in the target, {others.get(first)} in the "
        "draft)"
    )


@torch.inference_mode()
def describe_model(
    module: Any,
    kv_dtype: str,
    vocabulary: Vocabulary | None = None,  # that the module's head is a share of; None: whole
) -> LoadedModel:
    """Routes the module's attention to our pages and reads its geometry from a one-token forward.

    Every rank of a sharded module must call this together: the forward all-reduces. Raises
    UnsupportedModel when a layer keeps its own attention.
    """
    _refuse_unless_local(module.config.get_text_config())
    register_attention()
    module.eval()
    module.set_attn_implementation(ATTENTION_NAME)
    device = next(module.parameters()).device
    probe = _Probe()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    logits = module(
        input_ids=token, position_ids=token, use_cache=False, attention_context=probe
    ).logits
    num_layers = module.config.get_text_config().num_hidden_layers
    if len(probe.layers) != num_layers:
        raise UnsupportedModel(
            f"{type(module).__name__}: {len(probe.layers)} of {num_layers} layers dispatch through "
            "AttentionInterface"
        )
    dtype = cast(torch.dtype, getattr(torch, kv_dtype))
    vocabulary = vocabulary or Vocabulary.whole(logits.shape[-1])
    return LoadedModel(module, tuple(probe.layers), vocabulary, dtype, device)


def _refuse_unless_local(config: Any) -> None:
    """A row's attention may depend on its own sequence alone, in ways that our pages know.

    LongRoPE picks its frequencies by the longest row of a forward, so a sequence's tokens would
    depend on its neighbours; chunked attention lives in a mask that is never built for our name.
    """
    known = {"full_attention", "sliding_attention"}
    unknown = set(vars(config).get("layer_types") or ()) - known
    if unknown:
        raise UnsupportedModel(f"layers of type {', '.join(sorted(unknown))} are not supported")
    rope = vars(config).get("rope_parameters") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(kind.get("rope_type") == "longrope" for kind in kinds):
        raise UnsupportedModel("rope_type longrope is not supported: it depends on the batch")
