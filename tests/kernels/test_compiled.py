"""The C++ kernels agree with their oracles, and a row's result does not depend on its batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from magicdec.kernels import dispatch, reference, selection
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_attention import CpuAttention
from magicdec.kernels.cpu_attention_mass import CpuAttentionMass
from magicdec.kernels.cpu_linear import PackedLinear, pack_linears
from magicdec.kernels.paged_layout import PagedLayout
from tests.kernels.layouts import make_layout

LIBRARY = compiled_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no compiler here")
DTYPES = [  # of rows and pages
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedLayout, float]


def attention() -> CpuAttention:
    assert LIBRARY is not None
    return CpuAttention(LIBRARY)


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 0.03


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 1500), st.sampled_from([1, 2, 5, 17, 40])), min_size=1, max_size=4
    ),
    block_size=st.sampled_from([1, 8, 64]),
    contiguous=st.booleans(),
    kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    window=st.sampled_from([None, 1, 16, 700]),
    softcap=st.sampled_from([None, 5.0]),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_paged_attention_agrees_with_the_reference(
    spans: list[tuple[int, int]],
    block_size: int,
    contiguous: bool,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    context_lens, query_lens = [c for c, _ in spans], [q for _, q in spans]
    layout, num_blocks = make_layout(context_lens, query_lens, block_size, contiguous, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(query_lens), kv_heads * group_size, head_dim, generator=generator)
    shape = (2, kv_heads, num_blocks * block_size, head_dim)
    k_cache, v_cache = torch.randn(shape, generator=generator).to(dtypes[1])
    query = rows.to(dtypes[0]).transpose(0, 1)
    case = (query, k_cache, v_cache, layout, head_dim**-0.5, window, softcap)
    actual, expected = attention().paged(*case), reference.paged_attention(*case)
    # Chunks of prompts may go through torch's kernel, in the pages' dtype.
    within = tolerance(dtypes[1] if max(query_lens) > 32 else dtypes[0])
    assert actual.dtype == query.dtype
    torch.testing.assert_close(actual, expected, atol=within, rtol=within)


def lone_case(query_len: int, context_len: int, dtype: torch.dtype) -> Case:
    """The last rows of one text, whatever their number."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(6, 1200, 64, generator=generator).to(dtype)
    k_cache, v_cache = torch.randn(2, 2, 1216, 64, generator=generator).to(dtype)
    layout = PagedLayout((query_len,), (context_len,), (np.arange(19),), 64)
    return text[:, context_len : context_len + query_len], k_cache, v_cache, layout, 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_a_verified_row_is_the_plain_row_bit_for_bit(
    dtype: torch.dtype, window: int | None
) -> None:
    """Beside other drafts, beside other sequences, and by any number of threads."""
    kernel, num_threads = attention(), torch.get_num_threads()
    for first in (500, 511, 1000):
        case = lone_case(9, first, dtype)
        verified = kernel.paged(*case, window)
        for row in range(9):
            plain = kernel.paged(*lone_case(1, first + row, dtype), window)
            assert torch.equal(verified[:, row : row + 1], plain)
        layout = PagedLayout((3, 9), (40, first), (np.arange(1), np.arange(19)), 64)
        both = torch.cat([case[0][:, :3], case[0]], dim=1)
        try:
            torch.set_num_threads(3)
            beside = kernel.paged(both, *case[1:3], layout, 0.125, window)
        finally:
            torch.set_num_threads(num_threads)
        assert torch.equal(beside[:, 3:], verified)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    num_listed=st.integers(0, 700),
    num_own=st.integers(1, 4),
    kv_heads=st.integers(0, 3),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([16, 24, 80]),
    softcap=st.sampled_from([None, 5.0]),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_the_draft_steps_over_a_view_agree_with_the_reference(
    batch: int,
    num_listed: int,
    num_own: int,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    softcap: float | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(2, kv_heads, 300, head_dim, generator=generator).to(dtypes[1])
    slots = torch.randint(
        0, 300 * max(kv_heads, 1), (kv_heads, batch, num_listed), generator=generator
    )
    visible = torch.rand(batch, num_listed + num_own, generator=generator) < 0.7
    visible[:, num_listed] = True
    mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf")).to(dtypes[1])
    view = attention().view(cache[0], cache[1], slots, num_own)
    oracle = dispatch.REFERENCE.view(cache[0], cache[1], slots, num_own)
    for step in range(num_own):
        rows = torch.randn(batch, kv_heads * group_size, head_dim, generator=generator)
        own = torch.randn(2, kv_heads, batch, head_dim, generator=generator).to(dtypes[0])
        so_far = mask.clone()
        so_far[:, num_listed + step + 1 :] = float("-inf")
        case = (rows.to(dtypes[0]).transpose(0, 1), own[0], own[1], step, so_far, 0.25, softcap)
        within = tolerance(dtypes[0])
        torch.testing.assert_close(
            view.attend(*case), oracle.attend(*case), atol=within, rtol=within
        )


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 50),
    num_inputs=st.one_of(  # matrix units take multiples of 32
        st.integers(1, 150).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 32 * n)
    ),
    num_outputs=st.integers(1, 150),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_a_packed_linear_is_the_linear_of_its_rounded_weight(
    num_rows: int, num_inputs: int, num_outputs: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    assert LIBRARY is not None
    torch.manual_seed(seed)
    linear = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=dtype)
    packed = PackedLinear(linear, LIBRARY)
    rows = torch.randn(2, num_rows, num_inputs).to(dtype)
    weight = linear.weight.bfloat16().double()
    offset = None if linear.bias is None else linear.bias.double()
    expected = nn.functional.linear(rows.double(), weight, offset)
    within = {torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]  # rounded once, to nearest
    torch.testing.assert_close(packed(rows).double(), expected, atol=2e-5, rtol=within)
    for row in range(num_rows):
        assert torch.equal(packed(rows[0, row : row + 1]), packed(rows)[0, row : row + 1])


def test_linears_are_packed_wherever_they_are_but_for_odd_ones() -> None:
    assert LIBRARY is not None
    module = nn.Sequential(nn.Linear(8, 6), nn.ModuleDict({"a": nn.Linear(6, 7), "b": nn.ReLU()}))
    module.append(nn.Linear(7, 2))
    pack_linears(module, LIBRARY)
    kinds = [type(child) for child in module.modules() if not list(child.children())]
    assert kinds == [PackedLinear, PackedLinear, nn.ReLU, nn.Linear]
    with pytest.raises(ValueError, match="num_inputs must be even, got 7"):
        PackedLinear(nn.Linear(7, 2), LIBRARY)
    with pytest.raises(TypeError, match="must be torch"):
        PackedLinear(nn.Linear(8, 2), LIBRARY)(torch.zeros(1, 8).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_backend_is_chosen_on_a_cpu(dtype: torch.dtype) -> None:
    assert dispatch.select_backend(torch.device("cpu"), dtype).name == "compiled-cpu"


@settings(max_examples=60, deadline=None)
@given(
    context_len=st.integers(0, 1300),
    num_rows=st.sampled_from([1, 2, 5, 32]),
    num_others=st.integers(0, 3),
    block_size=st.sampled_from([1, 8, 64]),
    kv_heads=st.integers(0, 3),
    group_size=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([16, 64, 80]),
    softcap=st.sampled_from([None, 5.0]),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_the_mass_of_the_last_rows_agrees_with_torch(
    context_len: int,
    num_rows: int,
    num_others: int,
    block_size: int,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    softcap: float | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    """Torch's is held to the reference in test_selection.py. `num_others` rows come before."""
    query_len = num_rows + num_others
    layout, num_blocks = make_layout([context_len], [query_len], block_size, False, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, kv_heads * group_size, head_dim, generator=generator)
    pages = torch.randn(kv_heads, num_blocks * block_size, head_dim, generator=generator)
    query, k_cache = rows.to(dtypes[0]).transpose(0, 1), pages.to(dtypes[1])
    case = (query, k_cache, layout, 0, head_dim**-0.5, softcap)
    assert LIBRARY is not None
    actual, expected = CpuAttentionMass(LIBRARY)(*case), selection.attention_mass(*case)
    torch.testing.assert_close(actual, expected, atol=2e-5 * num_rows, rtol=1e-4)
