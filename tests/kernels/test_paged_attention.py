"""Torch's CPU kernels agree with their oracles over random shapes, block tables and windows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.kernels import paged_attention as cpu_kernel
from magicdec.kernels import reference
from magicdec.kernels.dispatch import REFERENCE, select_backend
from magicdec.kernels.sparse_attention import gather_view, gathered_attention
from tests.kernels.layouts import make_layout

HEAD_DIM = 16


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 700), st.sampled_from([1, 2, 5, 17, 40])), min_size=1, max_size=4
    ),
    block_size=st.sampled_from([1, 8, 64]),
    contiguous=st.booleans(),
    kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    window=st.sampled_from([None, 1, 16, 300]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 10_000),
)
def test_paged_attention_agrees_with_the_reference(
    spans: list[tuple[int, int]],
    block_size: int,
    contiguous: bool,
    kv_heads: int,
    group_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    context_lens, query_lens = [c for c, _ in spans], [q for _, q in spans]
    layout, num_blocks = make_layout(context_lens, query_lens, block_size, contiguous, seed)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * group_size, sum(query_lens), HEAD_DIM, generator=generator)
    shape = (2, kv_heads, num_blocks * block_size, HEAD_DIM)
    k_cache, v_cache = torch.randn(shape, generator=generator)
    case = (query, k_cache, v_cache, layout, HEAD_DIM**-0.5, window, softcap)
    actual = cpu_kernel.paged_attention(*case)
    torch.testing.assert_close(actual, reference.paged_attention(*case), atol=2e-5, rtol=2e-5)


def test_a_long_context_is_read_in_several_splits() -> None:
    """Above _SPLIT_KEYS the prefix is cut; leftovers and the causal tail take the masked call."""
    layout, num_blocks = make_layout([5000], [5], 64, True, 0)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 5, HEAD_DIM, generator=generator)
    k_cache, v_cache = torch.randn(2, 2, num_blocks * 64, HEAD_DIM, generator=generator)
    case = (query, k_cache, v_cache, layout, 0.25)
    assert len(layout.runs(0, 5000)) == 1
    torch.testing.assert_close(
        cpu_kernel.paged_attention(*case), reference.paged_attention(*case), atol=2e-5, rtol=2e-5
    )


def test_a_rank_without_kv_heads_returns_nothing() -> None:
    layout, num_blocks = make_layout([10], [3], 8, True, 0)
    empty = torch.zeros(0, num_blocks * 8, HEAD_DIM)
    out = cpu_kernel.paged_attention(torch.zeros(0, 3, HEAD_DIM), empty, empty, layout, 0.25)
    assert out.shape == (0, 3, HEAD_DIM)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    num_keys=st.integers(1, 50),
    kv_heads=st.integers(0, 3),
    group_size=st.integers(1, 3),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 10_000),
)
def test_gathered_attention_agrees_with_the_reference(
    batch: int, num_keys: int, kv_heads: int, group_size: int, softcap: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * group_size, batch, HEAD_DIM, generator=generator)
    cache = torch.randn(kv_heads, 200, HEAD_DIM, generator=generator)
    slots = torch.randint(0, 200, (kv_heads, batch, num_keys), generator=generator)
    view = gather_view(cache, slots + 200 * torch.arange(kv_heads)[:, None, None])
    for head in range(kv_heads):
        assert torch.equal(view[head], cache[head][slots[head]])
    visible = torch.rand(batch, num_keys, generator=generator) < 0.7
    visible[:, 0] = True
    mask = torch.zeros(batch, num_keys).masked_fill_(~visible, float("-inf"))
    case = (query, view, view, mask, 0.25, softcap)
    torch.testing.assert_close(
        gathered_attention(*case), reference.gathered_attention(*case), atol=2e-5, rtol=2e-5
    )


def test_the_reference_is_chosen_where_no_kernel_runs() -> None:
    assert select_backend(torch.device("meta"), torch.float32) is REFERENCE
