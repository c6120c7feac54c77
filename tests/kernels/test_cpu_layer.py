"""A compiled layer is its steps, bit for bit, and K/V rows are stored as torch stores them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from magicdec.kernels import kv_store
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_elementwise import CpuElementwise
from magicdec.kernels.cpu_layer import CpuLayer, LayerParts, Norm
from magicdec.kernels.cpu_linear import PackedLinear
from magicdec.kernels.cpu_store import CpuStore
from magicdec.kernels.head_norms import HeadNorms

LIBRARY = compiled_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no compiler here")
DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, GATES, HEADS, KV_HEADS, HEAD_DIM = 96, 160, 4, 2, 32


def made_parts(dtype: torch.dtype, has_biases: bool, has_head_norms: bool) -> LayerParts:
    assert LIBRARY is not None
    library = LIBRARY
    torch.manual_seed(0)

    def packed(num_inputs: int, num_outputs: int) -> PackedLinear:
        return PackedLinear(nn.Linear(num_inputs, num_outputs, bias=has_biases).to(dtype), library)

    norms = torch.rand(HEADS + KV_HEADS, HEAD_DIM).to(dtype)
    return LayerParts(
        input_norm=Norm(torch.rand(HIDDEN).to(dtype), 1e-5),
        attention_norm=Norm(torch.rand(HIDDEN).to(dtype), 1e-6),
        qkv=packed(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        attended=packed(HEADS * HEAD_DIM, HIDDEN),
        gate_up=packed(HIDDEN, 2 * GATES),
        down=packed(GATES, HIDDEN),
        num_heads=HEADS + 2 * KV_HEADS,
        num_turned=HEADS + KV_HEADS,
        head_dim=HEAD_DIM,
        head_norms=HeadNorms(norms, 1e-6) if has_head_norms else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 13, 40, 300])
@pytest.mark.parametrize("has_biases, has_head_norms", [(False, False), (True, True)])
def test_a_layer_around_its_attention_is_its_steps(
    dtype: torch.dtype, num_rows: int, has_biases: bool, has_head_norms: bool
) -> None:
    assert LIBRARY is not None
    parts, steps = made_parts(dtype, has_biases, has_head_norms), CpuElementwise(LIBRARY, dtype)
    layer = CpuLayer(LIBRARY, parts)
    rows, attended = torch.randn(num_rows, HIDDEN), torch.randn(num_rows, HEADS * HEAD_DIM)
    rows, attended = rows.to(dtype), attended.to(dtype)
    angles = torch.randn(num_rows, HEAD_DIM // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    first, second = parts.input_norm, parts.attention_norm
    heads = parts.qkv(steps.rms_norm(rows, first.weight, first.epsilon))
    heads = steps.rotate(heads, cos, sin, parts.num_turned, parts.head_norms)
    normed, summed = steps.add_rms_norm(
        parts.attended(attended), rows, second.weight, second.epsilon
    )
    output = summed + parts.down(steps.silu_product(parts.gate_up(normed)))

    torch.testing.assert_close(
        layer.start(rows, cos, sin).view(num_rows, -1), heads, atol=0, rtol=0
    )
    torch.testing.assert_close(layer.end(attended, rows), output, atol=0, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 20),
    kv_heads=st.integers(0, 3),
    head_dim=st.sampled_from([16, 24, 64, 80]),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.float16),
        ]
    ),
    seed=st.integers(0, 999),
)
def test_rows_are_stored_as_torch_stores_them(
    num_rows: int,
    kv_heads: int,
    head_dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    assert LIBRARY is not None
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 2 * kv_heads, head_dim, generator=generator).to(dtypes[0])
    heads = rows.transpose(0, 1)
    key, value = heads[:kv_heads], heads[kv_heads:]
    pages = torch.randn(2, kv_heads, 30, head_dim, generator=generator).to(dtypes[1])
    expected = pages.clone()
    slots = torch.randperm(30, generator=generator)[:num_rows]
    kv_store.store_kv(expected[0], expected[1], key, value, slots)
    CpuStore(LIBRARY)(pages[0], pages[1], key, value, slots)
    torch.testing.assert_close(pages, expected, atol=0, rtol=0)
