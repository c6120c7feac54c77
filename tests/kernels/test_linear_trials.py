"""By these trials linears of few rows are chosen: right ones pass, wrong and broken ones do not."""

from typing import Any

import pytest
import torch

from magicdec.kernels import reference
from magicdec.kernels.linear_trials import ColdTimer, difference_of_linears
from magicdec.kernels.triton_linear import TritonLinear

NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_tritons_linears_pass(device: torch.device, dtype: torch.dtype) -> None:
    kernel = TritonLinear(device)
    assert difference_of_linears(kernel.linear, kernel.gated_linear, device, dtype) < 0.02


def test_a_wrong_sum_and_wrong_gates_are_seen(device: torch.device) -> None:
    def without_residual(rows: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        return reference.linear(rows, weight, bias)

    def turned(rows: Any, weight: Any) -> torch.Tensor:
        return reference.gated_linear(rows, weight.roll(len(weight) // 2, 0))

    gated, case = reference.gated_linear, (device, torch.float32)
    assert difference_of_linears(without_residual, gated, *case) > 0.05
    assert difference_of_linears(reference.linear, turned, *case) > 0.05


def test_what_cannot_run_is_infinitely_off(device: torch.device) -> None:
    def broken(*case: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    difference = difference_of_linears(broken, broken, device, torch.float32)
    assert difference == float("inf")


def test_a_call_is_timed_after_one_that_compiles(device: torch.device) -> None:
    calls: list[int] = []

    def call() -> torch.Tensor:
        calls.append(len(calls))
        return torch.zeros(1, device=device)

    assert ColdTimer(device)(call) > 0.0
    assert len(calls) == 6
