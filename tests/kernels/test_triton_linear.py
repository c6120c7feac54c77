"""Triton's linears of few rows agree with their oracles, and a row with itself beside others."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdec.kernels import reference, triton_linear
from magicdec.kernels.triton_linear import MOST_ROWS, TritonLinear

GENERATED = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# The interpreter cannot multiply bfloat16.
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Of numbers of about 1: a sum in another order may fall to the other side of a rounding.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from([torch.float32, NARROW])
ROWS = st.integers(1, MOST_ROWS)
OUTPUTS = st.integers(1, 3).map(lambda n: 64 * n)
INPUTS = st.integers(1, 3).map(lambda n: 128 * n)


def made_up(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


@GENERATED
@given(
    dtype=DTYPES,
    num_rows=ROWS,
    num_outputs=OUTPUTS,
    num_inputs=INPUTS,
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_linear_agrees_with_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
    has_residual: bool,
    seed: int,
) -> None:
    rows = made_up(1, num_rows, num_inputs, seed=seed, dtype=dtype, device=device)
    weight = made_up(num_outputs, num_inputs, seed=1, dtype=dtype, device=device)
    weight /= num_inputs**0.5
    assert TritonLinear(device).fits(num_rows, weight)
    bias = made_up(num_outputs, seed=2, dtype=dtype, device=device) if has_bias else None
    residual = made_up(1, num_rows, num_outputs, seed=3, dtype=dtype, device=device)
    case = (rows, weight, bias, residual if has_residual else None)
    actual, expected = TritonLinear(device).linear(*case), reference.linear(*case)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, atol=4 * tolerance, rtol=tolerance)


@GENERATED
@given(
    dtype=DTYPES,
    num_rows=ROWS,
    num_dims=st.integers(1, 4).map(lambda n: 32 * n),
    num_inputs=INPUTS,
    has_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_gated_linear_agrees_with_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    num_dims: int,
    num_inputs: int,
    has_bias: bool,
    seed: int,
) -> None:
    rows = made_up(num_rows, num_inputs, seed=seed, dtype=dtype, device=device)
    weight = made_up(2 * num_dims, num_inputs, seed=1, dtype=dtype, device=device)
    weight /= num_inputs**0.5
    assert TritonLinear(device).fits(num_rows, weight)
    bias = made_up(2 * num_dims, seed=2, dtype=dtype, device=device) if has_bias else None
    actual = TritonLinear(device).gated_linear(rows, weight, bias)
    expected = reference.gated_linear(rows, weight, bias)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("num_rows", [16, 32, 64])
def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device, num_rows: int) -> None:
    """Nor on where it is among them."""
    rows = made_up(num_rows, 256, seed=0, dtype=NARROW, device=device)
    weight = made_up(128, 256, seed=1, dtype=NARROW, device=device)
    kernel = TritonLinear(device)
    fewest = num_rows // 2 + 1  # of the same tile
    for multiply in (kernel.linear, kernel.gated_linear):
        together = multiply(rows, weight)
        assert torch.equal(multiply(rows[:fewest], weight), together[:fewest])
        assert torch.equal(multiply(rows.flip(0), weight), together.flip(0))


def test_a_sum_is_of_what_was_rounded(device: torch.device) -> None:
    """As where transformers adds a linear's output to the residual."""
    rows = made_up(3, 128, seed=0, dtype=NARROW, device=device)
    weight = made_up(64, 128, seed=1, dtype=NARROW, device=device)
    residual = made_up(3, 64, seed=2, dtype=NARROW, device=device)
    kernel = TritonLinear(device)
    summed = kernel.linear(rows, weight, None, residual)
    assert torch.equal(summed, residual + kernel.linear(rows, weight))


@pytest.mark.parametrize(
    ("num_rows", "shape"), [(0, (64, 128)), (65, (64, 128)), (1, (96, 128)), (1, (64, 192))]
)
def test_other_sizes_do_not_fit(
    device: torch.device, num_rows: int, shape: tuple[int, int]
) -> None:
    kernel = TritonLinear(device)
    assert not kernel.fits(num_rows, torch.empty(shape))
    assert not kernel.fits(1, torch.empty(128, 64).T)


def test_stages_fit_the_shared_memory() -> None:
    """Of an A100, an H100, and a GPU with less."""
    choose = triton_linear.choose_num_stages
    assert [choose(16, 2, kib << 10) for kib in (163, 227, 99)] == [8, 8, 4]
    assert [choose(32, 2, kib << 10) for kib in (163, 227, 99)] == [6, 6, 4]
    assert [choose(64, 2, kib << 10) for kib in (163, 227, 99)] == [5, 6, 3]
