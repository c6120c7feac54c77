"""What a rank's memory holds, and what would fit where a plan does not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from magicdec.config import ConfigError
from magicdec.planning.devices import PlanDevice
from magicdec.roofline import ModelGeometry

_GB = 1e9


@dataclass(frozen=True, slots=True)
class PlanModel:
    """A model without its weights."""

    name: str
    geometry: ModelGeometry
    tied_head: bool = False  # one matrix is the input embedding and the output head
    max_context: int | None = None  # None: it declares none

    def rank_weight_bytes(self, num_ranks: int) -> float:
        """On the rank with the most heads. The embedding is whole on every rank, and a tied head
        is rows of it; any other is split by vocabulary."""
        shape = self.geometry
        embedding = shape.hidden_size * shape.vocab_size * shape.weight_element_bytes
        mlp_elements = 3 * shape.num_layers * shape.hidden_size * shape.intermediate_size
        mlp = mlp_elements * shape.weight_element_bytes
        attention = shape.weight_bytes - mlp - embedding
        head = 0.0 if self.tied_head else embedding / num_ranks
        return attention * fullest_share(shape, num_ranks) + mlp / num_ranks + head + embedding

    @property
    def even_degrees(self) -> list[int]:
        """Degrees of tensor parallelism that give every rank as many KV heads."""
        num_heads = self.geometry.num_kv_heads
        return [n for n in range(1, num_heads + 1) if num_heads % n == 0]


def fullest_share(geometry: ModelGeometry, num_ranks: int) -> float:
    """Of all KV heads, on the rank with the most: it sets the pace and the capacity."""
    return math.ceil(geometry.num_kv_heads / num_ranks) / geometry.num_kv_heads


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One rank's memory. `draft_model` is whole on every rank, with `draft_window` positions of
    each sequence."""

    model: PlanModel
    device: PlanDevice
    num_ranks: int
    draft_model: PlanModel | None = None
    draft_window: int = 0

    @property
    def weight_bytes(self) -> float:
        draft = self.draft_model.rank_weight_bytes(1) if self.draft_model is not None else 0.0
        return self.model.rank_weight_bytes(self.num_ranks) + draft

    @property
    def kv_pool_bytes(self) -> float:
        """Beside the weights; below 0 where these alone do not fit."""
        return self.device.usable_bytes - self.weight_bytes

    @property
    def capacity_tokens(self) -> int:
        """KV positions that the pool holds, a draft model's windows left out."""
        return max(int(self.kv_pool_bytes / self._token_bytes), 0)

    def kv_bytes(self, batch_size: int, context_len: int) -> float:
        return batch_size * (context_len * self._token_bytes + self._window_bytes)

    def max_batch(self, context_len: int) -> int:
        """Sequences of this length that fit at once."""
        return max(int(self.kv_pool_bytes / self.kv_bytes(1, context_len)), 0)

    def max_context(self, batch_size: int) -> int:
        """Positions that each of so many sequences may have."""
        left = self.kv_pool_bytes / batch_size - self._window_bytes
        return max(int(left / self._token_bytes), 0)

    def check(self, batch_sizes: Iterable[int], context_lens: Iterable[int]) -> None:
        """Raises ConfigError where not even the smallest batch fits at the shortest context."""
        batch_size, context_len = min(batch_sizes), min(context_lens)
        needed = self.kv_bytes(batch_size, context_len)
        ranks, usable = self.num_ranks, self.device.usable_bytes
        if self.weight_bytes >= usable:
            raise ConfigError(
                f"tensor_parallel_size {ranks}: the weights take {_gb(self.weight_bytes)} a rank, "
                f"and {self.device.name} has {_gb(usable)} usable; "
                + (
                    self._fitting_degree(batch_size, context_len)
                    or self._none_fits(batch_size, context_len)
                )
            )
        if needed <= self.kv_pool_bytes:
            return
        ways = []
        if self.max_context(batch_size) > 0:
            ways.append(f"contexts up to {self.max_context(batch_size):,} at batch {batch_size}")
        if self.max_batch(context_len) > 0:
            ways.append(f"batches up to {self.max_batch(context_len)} at context {context_len:,}")
        degree = self._fitting_degree(batch_size, context_len)
        if degree or not ways:
            ways.append(degree or self._none_fits(batch_size, context_len))
        raise ConfigError(
            f"batch {batch_size} at context {context_len:,}: its KV takes {_gb(needed)} a rank, "
            f"and {_gb(self.kv_pool_bytes)} are left beside the weights of {_gb(self.weight_bytes)}"
            f" on {self.device.name}; what would fit: {'; '.join(ways)}"
        )

    @property
    def _token_bytes(self) -> float:
        geometry = self.model.geometry
        return geometry.kv_bytes_per_token * fullest_share(geometry, self.num_ranks)

    @property
    def _window_bytes(self) -> float:
        if self.draft_model is None:
            return 0.0
        return self.draft_window * self.draft_model.geometry.kv_bytes_per_token

    def _fitting_degree(self, batch_size: int, context_len: int) -> str:
        """Empty where there is none."""
        for num_ranks in self.model.even_degrees:
            other = replace(self, num_ranks=num_ranks)
            if other.kv_bytes(batch_size, context_len) <= other.kv_pool_bytes:
                return f"the smallest tensor_parallel_size that fits is {num_ranks}"
        return ""

    def _none_fits(self, batch_size: int, context_len: int) -> str:
        most = replace(self, num_ranks=self.model.even_degrees[-1])
        needed = most.weight_bytes + most.kv_bytes(batch_size, context_len)
        return (
            f"no tensor_parallel_size does: at {most.num_ranks}, one KV head a rank, a rank needs "
            f"{_gb(needed)}"
        )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / _GB:,.1f} GB" if num_bytes >= _GB / 10 else f"{num_bytes / 1e6:,.2f} MB"
