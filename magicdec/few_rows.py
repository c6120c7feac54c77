"""Which of a model's linears go to a kernel for few rows: all but those that it is slower for,
timed once.

Rows of one size of tile go one way, so that a row's result does not depend on how many they are.
More rows, and sizes that the kernel does not know, stay with torch.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from magicdec.fused_layers import FewRowLinear, FusedMlp
from magicdec.kernels.layer_dispatch import Elementwise, FewRowLinears

logger = logging.getLogger(__name__)

_TIMED_ROWS = (1, 8, 32, 40)
_UNCLEAR = 0.05  # of a time

SecondsOf = Callable[[Callable[[], torch.Tensor]], float]


class Use(StrEnum):
    """What follows on a linear."""

    ALONE = "linear"
    SUMMED = "with a sum"
    GATED = "with gates"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a linear is in its model."""

    parent: nn.Module
    name: str
    linear: nn.Linear
    use: Use

    @property
    def kind(self) -> tuple[Use, torch.Size, bool]:
        return self.use, self.linear.weight.shape, self.linear.bias is not None


@torch.inference_mode()
def serve_few_rows(
    model: nn.Module, linears: FewRowLinears, kernels: Elementwise, seconds_of: SecondsOf
) -> None:
    """Replaces every nn.Linear below the model that the kernel is not slower for; weights stay."""
    tiles: dict[tuple[Use, torch.Size, bool], set[int]] = {}
    told: list[str] = []
    for place in list(_places(model)):
        if not linears.fits(1, place.linear.weight):
            continue
        if place.kind not in tiles:
            trial = _Trial(place, linears, kernels)
            times = {
                n: (seconds_of(trial.ours(n)), seconds_of(trial.torchs(n))) for n in _TIMED_ROWS
            }
            tiles[place.kind] = _served(times, linears)
            told.append(_line(place, times))
        if tiles[place.kind]:
            replacement = FewRowLinear(place.linear, linears, tiles[place.kind])
            setattr(place.parent, place.name, replacement)
    logger.info("us of %s rows, torch's beside: %s", _TIMED_ROWS, "; ".join(told) or "none fits")


def _places(model: nn.Module) -> Iterator[_Place]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield _Place(parent, name, child, _use(parent, name))


def _use(parent: nn.Module, name: str) -> Use:
    if not isinstance(parent, FusedMlp):
        return Use.ALONE
    return Use.GATED if name == "gate_up_proj" else Use.SUMMED


class _Trial:
    """A linear of zeros that are as many as a step's."""

    def __init__(self, place: _Place, linears: FewRowLinears, kernels: Elementwise) -> None:
        self._linear, self._use = place.linear, place.use
        self._linears, self._kernels = linears, kernels

    def ours(self, num_rows: int) -> Callable[[], torch.Tensor]:
        rows, residual = self._made_up(num_rows)
        weight, bias = self._linear.weight, self._linear.bias
        if self._use is Use.GATED:
            return lambda: self._linears.gated_linear(rows, weight, bias)
        beside = residual if self._use is Use.SUMMED else None
        return lambda: self._linears.linear(rows, weight, bias, beside)

    def torchs(self, num_rows: int) -> Callable[[], torch.Tensor]:
        rows, residual = self._made_up(num_rows)
        linear = self._linear
        if self._use is Use.GATED:
            return lambda: self._kernels.silu_product(linear(rows))
        if self._use is Use.SUMMED:
            return lambda: residual + linear(rows)
        return lambda: linear(rows)

    def _made_up(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._linear.weight
        num_outputs, num_inputs = weight.shape
        return weight.new_zeros(num_rows, num_inputs), weight.new_zeros(num_rows, num_outputs)


def _served(times: dict[int, tuple[float, float]], linears: FewRowLinears) -> set[int]:
    """The tiles whose rows go to the kernel: all but those for which torch's is clearly faster. A
    trial does not tell what differs by less, and torch's rows depend on one another."""
    gained: dict[int, float] = {}
    for num_rows, (ours, torchs) in times.items():
        tile = linears.tile_rows(num_rows)
        gained[tile] = gained.get(tile, 0.0) + torchs * (1.0 + _UNCLEAR) - ours
    return {tile for tile, seconds in gained.items() if seconds > 0}


def _line(place: _Place, times: dict[int, tuple[float, float]]) -> str:
    num_outputs, num_inputs = place.linear.weight.shape
    ours, torchs = (
        " ".join(f"{1e6 * t:.1f}" for t in each) for each in zip(*times.values(), strict=True)
    )
    return f"{num_outputs} x {num_inputs} {place.use} {ours} ({torchs})"
