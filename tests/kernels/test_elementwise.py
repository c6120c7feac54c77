"""The small steps between a layer's linears agree with their oracles, row by row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from magicdec.kernels import reference
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_elementwise import CpuElementwise
from magicdec.kernels.head_norms import HeadNorms

LIBRARY = compiled_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no compiler here")
DIMS = st.integers(1, 8).map(lambda n: 32 * n)
SIZES = st.sampled_from([1e-3, 1.0, 80.0])


def kernels(dtype: torch.dtype = torch.float32) -> CpuElementwise:
    assert LIBRARY is not None
    return CpuElementwise(LIBRARY, dtype)


def made_up(*shape: int, size: float, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(0, 300), num_dims=DIMS, size=SIZES, seed=st.integers(0, 999))
def test_a_norm_agrees_with_the_reference(
    num_rows: int, num_dims: int, size: float, seed: int
) -> None:
    rows = made_up(1, num_rows, num_dims, size=size, seed=seed)
    case = (rows, made_up(num_dims, size=1.0, seed=1), 1e-5)
    actual = kernels().rms_norm(*case)
    torch.testing.assert_close(actual, reference.rms_norm(*case), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(0, 300), num_dims=DIMS, size=SIZES, seed=st.integers(0, 999))
def test_a_norm_of_a_sum_agrees_with_the_reference(
    num_rows: int, num_dims: int, size: float, seed: int
) -> None:
    """And the sum is torch's own, bfloat16 or not."""
    rows, residual = made_up(2, num_rows, num_dims, size=size, seed=seed)
    case = (rows, residual, made_up(num_dims, size=1.0, seed=1), 1e-5)
    actual, summed = kernels().add_rms_norm(*case)
    expected, _ = reference.add_rms_norm(*case)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(summed, rows + residual)
    narrow = [tensor.bfloat16() for tensor in case[:3]]
    normed, summed = kernels(torch.bfloat16).add_rms_norm(narrow[0], narrow[1], narrow[2], 1e-5)
    assert torch.equal(summed, narrow[0] + narrow[1])
    assert torch.equal(normed, kernels(torch.bfloat16).rms_norm(summed, narrow[2], 1e-5))


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(0, 300), num_dims=DIMS, size=SIZES, seed=st.integers(0, 999))
def test_a_gate_agrees_with_the_reference(
    num_rows: int, num_dims: int, size: float, seed: int
) -> None:
    """Gates of any size: e^x overflows at none."""
    rows = made_up(num_rows, 2 * num_dims, size=size, seed=seed)
    actual, expected = kernels().silu_product(rows), reference.silu_product(rows)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    head_dim=st.sampled_from([32, 64, 128]),
    num_heads=st.integers(1, 6),
    num_others=st.integers(0, 3),
    has_norms=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_first_heads_rotate_as_in_the_reference(
    num_rows: int, head_dim: int, num_heads: int, num_others: int, has_norms: bool, seed: int
) -> None:
    """After their norms, where they have any."""
    rows = made_up(num_rows, (num_heads + num_others) * head_dim, size=1.0, seed=seed)
    cos, sin = made_up(2, num_rows, head_dim, size=1.0, seed=seed + 1)
    weights = made_up(num_heads, head_dim, size=1.0, seed=seed + 2)
    norms = HeadNorms(weights, 1e-5) if has_norms else None
    expected = reference.rotate(rows, cos, sin, num_heads, norms)
    actual = kernels().rotate(rows.clone(), cos, sin, num_heads, norms)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    others = num_heads * head_dim
    assert torch.equal(actual[:, others:], rows[:, others:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_heads_are_norms_then_a_rotation(dtype: torch.dtype) -> None:
    """To the bit: in one pass nothing is rounded elsewhere."""
    rows, weights = made_up(9, 3 * 64, size=2.0, seed=0).to(dtype), made_up(3, 64, size=1.0, seed=1)
    cos, sin = made_up(2, 9, 64, size=1.0, seed=2).to(dtype)
    norms, ours = HeadNorms(weights.to(dtype), 1e-5), kernels(dtype)
    heads = rows.view(9, 3, 64).unbind(1)
    normed = [ours.rms_norm(head, norms.weights[i], 1e-5) for i, head in enumerate(heads)]
    expected = ours.rotate(torch.cat(normed, dim=1), cos, sin, 3)
    assert torch.equal(ours.rotate(rows, cos, sin, 3, norms), expected)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Nor on how many threads there are: 700 rows are shared out, one is not."""
    rows = made_up(700, 128, size=1.0, seed=3)
    weight = made_up(128, size=1.0, seed=4)
    together = kernels().rms_norm(rows, weight, 1e-6)
    assert torch.equal(kernels().rms_norm(rows[333:334], weight, 1e-6), together[333:334])
    gated = kernels().silu_product(rows)
    assert torch.equal(kernels().silu_product(rows[333:334]), gated[333:334])


@example(num_rows=12, size=80.0, seed=874)
@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 40), size=SIZES, seed=st.integers(0, 999))
def test_bfloat16_is_rounded_where_transformers_rounds_it(
    num_rows: int, size: float, seed: int
) -> None:
    """All but a few numbers are equal: an exponential or a sum may fall to the other side, a unit
    of 2^-7 at most, which a product's own rounding may make two; what is next to nothing may be
    nothing."""
    rows = made_up(num_rows, 256, size=size, seed=seed).bfloat16()
    norm = LlamaRMSNorm(256, 1e-5).bfloat16()
    norm.weight.data = made_up(256, size=1.0, seed=seed).bfloat16()
    gates, rest = rows.chunk(2, dim=-1)
    cos, sin = made_up(2, num_rows, 64, size=1.0, seed=seed + 1).bfloat16()
    heads = rows.view(1, num_rows, 4, 64).transpose(1, 2)
    turned, _ = apply_rotary_pos_emb(heads, heads, cos[None], sin[None])
    ours = kernels(torch.bfloat16)
    with torch.inference_mode():
        pairs = [
            (ours.rms_norm(rows, norm.weight, 1e-5), norm(rows)),
            (ours.silu_product(rows), torch.nn.functional.silu(gates) * rest),
            (ours.rotate(rows.clone(), cos, sin, 4), turned[0].transpose(0, 1).flatten(1)),
        ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, atol=1e-30, rtol=2**-6)
        num_different = int(((actual - expected).abs() > 1e-30).sum())
        assert num_different <= 2 + expected.numel() // 200
