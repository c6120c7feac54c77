"""What AutoTP would do to a model, found on shapes alone, before a byte of it is loaded.

DeepSpeed splits every `nn.Linear` of a decoder layer by its name and leaves the rest whole, without
a word about what that means for the model. Here the same split is worked out with DeepSpeed's own
functions (`AutoTP.tp_parser`, `get_shard_size_list`), and a model whose forward it would break is
refused with the module, the reason and what would fit. The head is split by vocabulary, not by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from magicdec.attention import UnsupportedModel
from magicdec.cluster.vocabulary_head import find_head
from magicdec.vocabulary import even_bounds

FUSED_QKV_NAMES = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "qkv", "in_proj_qkv")
GRAIN = 64  # DeepSpeed's tp_grain_size: an MLP is cut in multiples of it

Shape = tuple[int, ...]


class UnshardableModel(UnsupportedModel):
    """A model that serves on one rank and not on more; names module, reason and what would fit."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {reason}; it fits with tensor_parallel_size 1")
        self.module = module
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.module, self.reason))


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """How a model would lie on `num_ranks` ranks.

    `shapes` maps each parameter to its shape on rank 0, 1, ...; `replicated` names the weights
    (norms and biases aside) that every rank holds whole: the embedding always, and experts.
    """

    num_ranks: int
    query_heads: tuple[int, ...]  # [num_ranks]
    kv_heads: tuple[int, ...]  # [num_ranks]
    shapes: dict[str, tuple[Shape, ...]]
    replicated: tuple[str, ...]
    warnings: tuple[str, ...]


def preflight(model: PreTrainedConfig | str, num_ranks: int) -> PreflightReport:
    """Works out the split of a model, given by configuration or by folder or hub id.

    Raises UnshardableModel where the sharded forward would fail or be wrong.
    """
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    text_config = config.get_text_config()
    if num_ranks == 1:
        return _whole(module, text_config)
    _refuse_what_breaks(module)
    shapes = _predict_shapes(module, text_config, num_ranks)
    query_heads, kv_heads = _heads_by_rank(module, shapes)
    replicated = tuple(_replicated_weights(module, shapes))
    warnings = _warnings(module, query_heads, kv_heads, replicated)
    return PreflightReport(num_ranks, query_heads, kv_heads, shapes, replicated, warnings)


def _whole(module: nn.Module, config: PreTrainedConfig) -> PreflightReport:
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    shapes: dict[str, tuple[Shape, ...]] = {
        name: (tuple(p.shape),) for name, p in _named_parameters(module)
    }
    return PreflightReport(1, (query_heads,), (kv_heads,), shapes, (), ())


def _attention_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if isinstance(getattr(child, "q_proj", None), nn.Linear):
            yield name, child


def _refuse_what_breaks(module: nn.Module) -> None:
    for name, child in module.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in FUSED_QKV_NAMES and hasattr(child, "weight"):
            raise UnshardableModel(
                name,
                "query, key and value are one fused weight, which AutoTP may cut across heads",
            )
        if type(child).__name__ == "Conv1D":
            raise UnshardableModel(
                name, "a Conv1D layer, stored transposed, is not split by AutoTP"
            )
    if next(_attention_modules(module), None) is None:
        raise UnshardableModel(type(module).__name__, "no layer has a q_proj that AutoTP could cut")
    for name, attention in _attention_modules(module):
        _refuse_whole_head_parameters(name, attention)


def _refuse_whole_head_parameters(name: str, attention: nn.Module) -> None:
    """A norm over all heads, or one value a head, stays whole while the heads are split."""
    query_width = _linear(attention, "q_proj").out_features
    key_width = _linear(attention, "k_proj").out_features
    head_dim = _head_dim(attention)
    widths = {query_width, key_width, query_width // head_dim} - {head_dim}
    split = {id(p) for m in attention.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    for leaf, parameter in attention.named_parameters():
        if id(parameter) not in split and parameter.shape[0] in widths:
            raise UnshardableModel(
                f"{name}.{leaf}",
                f"it spans all heads ({tuple(parameter.shape)}) and AutoTP would leave it whole",
            )


def _linear(attention: nn.Module, name: str) -> nn.Linear:
    child = getattr(attention, name, None)
    if not isinstance(child, nn.Linear):
        raise UnshardableModel(f"{type(attention).__name__}.{name}", "not an nn.Linear")
    return child


def _head_dim(attention: nn.Module) -> int:
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        raise UnshardableModel(f"{type(attention).__name__}.head_dim", "not declared")
    return head_dim


def _predict_shapes(
    module: nn.Module, config: PreTrainedConfig, num_ranks: int
) -> dict[str, tuple[Shape, ...]]:
    """Every parameter's shape on every rank, by the rules of AutoTP._replace and of SplitHead."""
    shapes = {n: (tuple(p.shape),) * num_ranks for n, p in _named_parameters(module)}
    row_parallel, split_classes = _parse_with_autotp(module)
    for layer_name, layer in module.named_modules():
        if type(layer) in split_classes:
            for name, child in layer.named_modules():
                if isinstance(child, nn.Linear):
                    parent, _, leaf = name.rpartition(".")
                    short = f"{parent.rpartition('.')[2]}.{leaf}"
                    row = short in row_parallel or "down_proj" in short
                    _split(shapes, f"{layer_name}.{name}", child, short, row, config)
    _split_head(shapes, module, num_ranks)
    return shapes


def _split_head(shapes: dict[str, tuple[Shape, ...]], module: nn.Module, num_ranks: int) -> None:
    name, head = find_head(module)
    try:
        bounds = even_bounds(head.out_features, num_ranks)
    except ValueError as error:
        raise UnshardableModel(name, str(error)) from error
    shares = [stop - start for start, stop in pairwise(bounds)]
    shapes[f"{name}.weight"] = tuple((share, head.in_features) for share in shares)
    if head.bias is not None:
        shapes[f"{name}.bias"] = tuple((share,) for share in shares)


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)  # a tied head has a name of its own


def _parse_with_autotp(module: nn.Module) -> tuple[set[str], set[type[nn.Module]]]:
    """Names ("self_attn.o_proj") that end in an all-reduce, and the classes of split layers."""
    from deepspeed.module_inject.auto_tp import AutoTP

    try:
        policies = AutoTP.tp_parser(module)
    except AssertionError as error:
        raise UnshardableModel(type(module).__name__, str(error)) from error
    names = {name for _, layer_names in policies for name in layer_names}
    return names, {layer_class for layer_class, _ in policies}


def _split(
    shapes: dict[str, tuple[Shape, ...]],
    name: str,
    linear: nn.Linear,
    short_name: str,
    row: bool,
    config: PreTrainedConfig,
) -> None:
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    if short_name == "mlp.gate" or "q_a_proj" in short_name or "kv_a_proj_with_mqa" in short_name:
        return  # the router and the low-rank projections: AutoTP skips them by these names
    num_ranks = len(shapes[f"{name}.weight"])
    meta = AutoTPMeta.from_model_config(config, GRAIN)
    out, width = linear.weight.shape
    if "gate_up_proj" in short_name:  # two weights in one: a share of each
        sizes = [2 * n for n in get_shard_size_list(out // 2, num_ranks, meta, short_name)]
    else:
        sizes = get_shard_size_list(width if row else out, num_ranks, meta, short_name)
    shapes[f"{name}.weight"] = tuple((out, n) if row else (n, width) for n in sizes)
    if linear.bias is not None and not row:
        shapes[f"{name}.bias"] = tuple((n,) for n in sizes)


def _heads_by_rank(
    module: nn.Module, shapes: dict[str, tuple[Shape, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the first layer: the others are cut by the same KV head count."""
    name, attention = next(_attention_modules(module))
    head_dim = _head_dim(attention)
    query = tuple(shape[0] // head_dim for shape in shapes[f"{name}.q_proj.weight"])
    key = tuple(shape[0] // head_dim for shape in shapes[f"{name}.k_proj.weight"])
    return query, key


def _replicated_weights(module: nn.Module, shapes: dict[str, tuple[Shape, ...]]) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and set(shapes[name]) == {tuple(parameter.shape)}:
            yield name


def _warnings(
    module: nn.Module,
    query_heads: tuple[int, ...],
    kv_heads: tuple[int, ...],
    replicated: tuple[str, ...],
) -> tuple[str, ...]:
    warnings = []
    idle = [rank for rank, heads in enumerate(kv_heads) if heads == 0]
    if idle:
        warnings.append(
            f"{sum(kv_heads)} KV heads on {len(kv_heads)} ranks: ranks {idle} hold no attention "
            f"head and no KV cache; tensor_parallel_size {sum(kv_heads)} would use every rank"
        )
    elif len(set(kv_heads)) > 1:
        warnings.append(
            f"heads are split unevenly: {list(query_heads)} query and {list(kv_heads)} KV heads; "
            "the largest share sets the pace and the KV capacity"
        )
    parameters = dict(module.named_parameters())
    experts = [name for name in replicated if parameters[name].dim() >= 3]
    if experts:
        count = sum(parameters[name].numel() for name in experts)
        warnings.append(
            f"{len(experts)} expert weights ({count:,} parameters, first {experts[0]}) are 3-D "
            "tensors, which AutoTP leaves whole: every rank holds and computes all of them"
        )
    return tuple(warnings)
