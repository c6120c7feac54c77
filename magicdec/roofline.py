"""Step times and closed forms from a model's geometry and a device's rates, before any measurement.

A roofline: the linears read their weights or compute, attention reads K/V and computes on them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from magicdec.cost_model import StepCost, StepShape, expected_tokens

# Fields of transformers configs whose layers hold several MLPs, of which a token uses some.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """A dense decoder with gated MLPs, as far as its bytes and arithmetic go.

    Weights are those that a step reads: the linears of the layers and the output head. The input
    embedding is looked up by row, and norms and biases are too small to count.
    """

    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    weight_element_bytes: int = 2
    kv_element_bytes: int = 2
    sliding_windows: tuple[int | None, ...] | None = None  # [num_layers]; None: no layer has one

    def __post_init__(self) -> None:
        windows = self.sliding_windows
        if windows is not None and len(windows) != self.num_layers:
            raise ValueError(
                f"sliding_windows must name {self.num_layers} layers, got {len(windows)}"
            )

    @classmethod
    def from_config(
        cls, config: Any, *, weight_element_bytes: int = 2, kv_element_bytes: int = 2
    ) -> "ModelGeometry":
        """From a transformers configuration. Raises ValueError for a mixture of experts."""
        text = config.get_text_config()
        fields = vars(text)
        experts = [name for name in _EXPERTS if (fields.get(name) or 0) > 1]
        if experts:
            raise ValueError(f"{experts[0]} is {fields[experts[0]]}: experts are not modelled")
        num_heads = int(text.num_attention_heads)
        window = fields.get("sliding_window")
        kinds = fields.get("layer_types") or ["sliding_attention"] * int(text.num_hidden_layers)
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return cls(
            num_layers=int(text.num_hidden_layers),
            hidden_size=int(text.hidden_size),
            num_query_heads=num_heads,
            num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
            head_dim=int(fields.get("head_dim") or text.hidden_size // num_heads),
            intermediate_size=int(text.intermediate_size),
            vocab_size=int(text.vocab_size),
            weight_element_bytes=weight_element_bytes,
            kv_element_bytes=kv_element_bytes,
            sliding_windows=windows if any(w is not None for w in windows) else None,
        )

    @property
    def num_weights(self) -> int:
        """Elements of the linears and the head."""
        attention = (
            2 * self.hidden_size * self.head_dim * (self.num_query_heads + self.num_kv_heads)
        )
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * self.weight_element_bytes

    @property
    def flops_per_row(self) -> int:
        """Of the linears and the head, for one token."""
        return 2 * self.num_weights

    @property
    def flops_per_row_product(self) -> int:
        """Of attention, for one token over one position: scores and weighted values."""
        return 4 * self.num_layers * self.num_query_heads * self.head_dim

    @property
    def _layer_kv_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.kv_element_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Kept for every token, in windowed layers too: no page is given back behind a window."""
        return self.num_layers * self._layer_kv_bytes

    def kv_bytes_read(self, context_len: float) -> float:
        """Of one sequence in one forward; a sliding-window layer reads its window at most."""
        windows = self.sliding_windows or (None,)
        seen = sum(context_len if w is None else min(context_len, w) for w in windows)
        return seen * self.kv_bytes_per_token / len(windows)

    def mean_context(self, context_len: float) -> float:
        """Positions that a row attends to, over the layers: what row_products count."""
        return self.kv_bytes_read(context_len) / self.kv_bytes_per_token

    def context_reading(self, kv_bytes: float) -> float:
        """The context whose reading takes so many bytes; infinite where windows keep it below."""
        windows = self.sliding_windows or (None,)
        seen = kv_bytes / self.kv_bytes_per_token * len(windows)  # summed over the layers
        open_layers = len(windows)
        for window in sorted(w for w in windows if w is not None):
            if seen <= window * open_layers:
                break
            seen -= window
            open_layers -= 1
        return seen / open_layers if open_layers else math.inf

    def step_shape(self, rows: Sequence[int], contexts: Sequence[int]) -> StepShape:
        """Of one forward in which sequence i runs rows[i] tokens over contexts[i] positions."""
        products = sum(r * self.mean_context(c) for r, c in zip(rows, contexts, strict=True))
        read = sum(self.kv_bytes_read(c) for c in contexts)
        return StepShape(sum(rows), read, products, len(contexts))


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the CPU, by the rates it sustains: not those of its data sheet."""

    bandwidth: float  # bytes a second
    arithmetic: float  # floating-point operations a second, in the dtype of the linears
    memory_bytes: int
    fixed_seconds: float  # of a forward, whatever its size: launches, and all-reduces over ranks

    def __post_init__(self) -> None:
        for name, value in (("bandwidth", self.bandwidth), ("arithmetic", self.arithmetic)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"Device.{name} must be finite and above 0, got {value}")
        if not 0.0 <= self.fixed_seconds < math.inf:
            raise ValueError(
                f"Device.fixed_seconds must be finite and at least 0, got {self.fixed_seconds}"
            )


def roofline_cost(
    geometry: ModelGeometry, device: Device, tensor_parallel_size: int = 1
) -> StepCost:
    """The prior of every kind of step on so many devices; StepShape counts all ranks together.

    Attention waits for the rank with the most heads. Raises ValueError for a degree below 1 or
    above the number of query heads.
    """
    ranks = tensor_parallel_size
    if not 1 <= ranks <= geometry.num_query_heads:
        raise ValueError(
            f"tensor_parallel_size must be between 1 and {geometry.num_query_heads} "
            f"(the query heads), got {ranks}"
        )
    kv_share = math.ceil(geometry.num_kv_heads / ranks) / geometry.num_kv_heads
    return StepCost(
        fixed=device.fixed_seconds,
        weights=geometry.weight_bytes / ranks / device.bandwidth,
        per_row=geometry.flops_per_row / ranks / device.arithmetic,
        per_kv_byte=kv_share / device.bandwidth,
        per_row_product=geometry.flops_per_row_product * kv_share / device.arithmetic,
        per_sequence=0.0,
    )


def kv_weight_ratio(geometry: ModelGeometry, batch_size: int, context_len: float) -> float:
    """KV bytes over weight bytes that a plain step reads.

    Self-speculation cannot pass tokens / (gamma / (1 + ratio) + v): its drafts read the weights.
    """
    return batch_size * geometry.kv_bytes_read(context_len) / geometry.weight_bytes


def context_where_kv_overtakes(geometry: ModelGeometry, batch_size: int = 1) -> float:
    """The context from which a plain step reads more K/V than weights; infinite if never."""
    return geometry.context_reading(geometry.weight_bytes / batch_size)


def critical_context(
    geometry: ModelGeometry,
    device: Device,
    *,
    acceptance: float,
    draft_length: int,
    draft_budget: float,
) -> float:
    """The context from which self-speculation gains, and gains more, as the batch grows.

    In the limit of a large batch the linears compute (f a row), attention reads (k a position), and
    draft_length * (f + k K) + (draft_length + 1) f + k S < tokens * (f + k S) for S above

        S* = [f / k * (2 draft_length + 1 - tokens) + draft_length * K] / (tokens - 1)

    (MagicDec sections 3.2 and 4.1 describe it without the closed form.) Infinite where a round
    yields one token. The degree of tensor parallelism cancels out.
    """
    gain = expected_tokens(acceptance, draft_length) - 1.0
    if gain <= 0.0:
        return math.inf
    bytes_per_flop = device.bandwidth / device.arithmetic
    extra_rows = 2.0 * draft_length - gain
    linears = extra_rows * geometry.flops_per_row * bytes_per_flop
    drafts = draft_length * geometry.kv_bytes_read(draft_budget)
    return geometry.context_reading((linears + drafts) / gain)
