"""Triton's attentions agree with their oracles over ragged shapes, on a GPU or interpreted."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdec.kernels import (
    reference,
    selection,
    selection_reference,
    triton_attention,
    triton_mass,
)
from magicdec.kernels.triton_view import make_view
from tests.kernels.layouts import make_layout

# The interpreter multiplies bfloat16 as the integers that it keeps them in.
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 3 if torch.cuda.is_available() else 2]
# Weights are rounded to the pages' dtype before they meet the values.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made_up(seed: int, dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


@settings(GENERATED, max_examples=25)
@given(
    spans=st.lists(
        st.tuples(st.sampled_from([0, 1, 63, 64, 65, 255, 256, 300, 700]), st.integers(1, 17)),
        min_size=1,
        max_size=3,
    ),
    block_size=st.sampled_from([1, 16, 64, 256]),
    contiguous=st.booleans(),
    kv_heads=st.integers(1, 2),
    group_size=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    window=st.sampled_from([None, 1, 16, 300]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_paged_attention_agrees_with_the_reference(
    device: torch.device,
    spans: list[tuple[int, int]],
    block_size: int,
    contiguous: bool,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    check_paged(
        device,
        spans,
        block_size,
        contiguous,
        (kv_heads, group_size, head_dim),
        window,
        softcap,
        dtype,
        seed,
    )


def check_paged(
    device: torch.device,
    spans: list[tuple[int, int]],
    block_size: int,
    contiguous: bool,
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    kv_heads, group_size, head_dim = heads
    context_lens, query_lens = [c for c, _ in spans], [q for _, q in spans]
    layout, num_blocks = make_layout(context_lens, query_lens, block_size, contiguous, seed)
    query = made_up(seed, dtype, device, kv_heads * group_size, sum(query_lens), head_dim)
    shape = (2, kv_heads, num_blocks * block_size, head_dim)
    k_cache, v_cache = made_up(seed + 1, dtype, device, *shape)
    options = (head_dim**-0.5, window, softcap)
    actual = triton_attention.paged_attention(query, k_cache, v_cache, layout, *options)
    on_host = (query.cpu().float(), k_cache.cpu().float(), v_cache.cpu().float())
    expected = reference.paged_attention(*on_host, layout, *options)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.cpu().float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("query_len", [33, 70])
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompts_chunk_goes_beside_short_rows(
    device: torch.device, query_len: int, window: int | None
) -> None:
    spans = [(300, 1), (100, query_len), (0, 5)]
    check_paged(device, spans, 64, False, (2, 3, 64), window, None, torch.float32, 3)


def test_a_long_context_is_read_in_splits_longer_than_the_shortest(device: torch.device) -> None:
    least = triton_attention.MIN_SPLIT_KEYS * triton_attention.MAX_SPLITS
    check_paged(device, [(least + 100, 2)], 256, True, (1, 1, 64), None, None, torch.float32, 4)


def test_a_row_is_the_same_alone_and_among_others(device: torch.device) -> None:
    """Bit for bit: nothing of how its keys are split depends on its neighbours."""
    context_lens, query_lens = [700, 1500, 40], [5, 1, 3]
    layout, num_blocks = make_layout(context_lens, query_lens, 64, False, 1)
    query = made_up(1, DTYPES[-1], device, 6, sum(query_lens), 64)
    k_cache, v_cache = made_up(2, DTYPES[-1], device, 2, 2, num_blocks * 64, 64)
    attend = triton_attention.paged_attention
    together = attend(query, k_cache, v_cache, layout, 0.125)
    for i, start in enumerate([0, 5, 6]):
        alone, _ = make_layout([context_lens[i]], [query_lens[i]], 64, True, 0)
        alone.block_tables[0][:] = layout.block_tables[i]
        rows = query[:, start : start + query_lens[i]]
        expected = attend(rows, k_cache, v_cache, alone, 0.125)
        assert torch.equal(together[:, start : start + query_lens[i]], expected)


@pytest.mark.parametrize("num_kv_heads", [0])
def test_a_rank_without_kv_heads_returns_nothing(device: torch.device, num_kv_heads: int) -> None:
    layout, num_blocks = make_layout([10], [3], 8, True, 0)
    empty = torch.zeros(num_kv_heads, num_blocks * 8, 64, device=device)
    query = torch.zeros(0, 3, 64, device=device)
    attend = triton_attention.paged_attention
    assert attend(query, empty, empty, layout, 0.25).shape == (0, 3, 64)
    assert triton_mass.attention_mass([query], [empty], layout, 0, 0.25).shape == (1, 0, 13)
    view = make_view(empty, empty, torch.zeros(0, 3, 4, dtype=torch.long, device=device), 2)
    mask = torch.zeros(3, 6, device=device)
    assert view.attend(query, query, query, 0, mask, 0.25).shape == (0, 3, 64)


@settings(GENERATED, max_examples=15)
@given(
    batch=st.integers(1, 3),
    num_listed=st.sampled_from([0, 1, 64, 127, 128, 129, 300]),
    num_own=st.integers(1, 17),
    kv_heads=st.integers(1, 2),
    group_size=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([64, 80, 128]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_draft_steps_over_a_view_agree_with_the_reference(
    device: torch.device,
    batch: int,
    num_listed: int,
    num_own: int,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_slots = 500
    caches = made_up(seed, dtype, device, 2, kv_heads, num_slots, head_dim)
    generator = torch.Generator().manual_seed(seed)
    shape = (kv_heads, batch, num_listed)
    slots = torch.randint(num_slots, shape, generator=generator)
    slots = (slots + torch.arange(kv_heads)[:, None, None] * num_slots).to(device)
    hidden = torch.rand(batch, num_listed + num_own, generator=generator) < 0.2
    view = make_view(caches[0], caches[1], slots, num_own)
    flat = [cache.reshape(-1, head_dim)[slots].float().cpu() for cache in caches]
    k_view, v_view = (torch.nn.functional.pad(part, (0, 0, 0, num_own)) for part in flat)
    for step in range(num_own if num_own < 4 else 3):
        rows = made_up(seed + step, dtype, device, 3, kv_heads * group_size, batch, head_dim)
        query, key, value = rows[0], rows[1][:kv_heads], rows[2][:kv_heads]
        hidden[:, num_listed + step] = False
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        mask[:, num_listed + step + 1 :] = float("-inf")
        k_view[:, :, num_listed + step] = key.float().cpu()
        v_view[:, :, num_listed + step] = value.float().cpu()
        actual = view.attend(query, key, value, step, mask.to(dtype).to(device), 0.125, softcap)
        expected = reference.gathered_attention(
            query.float().cpu(), k_view, v_view, mask, 0.125, softcap
        )
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(actual.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@settings(GENERATED, max_examples=15)
@given(
    context_len=st.sampled_from([0, 30, 64, 511, 600]),
    query_len=st.integers(1, 40),
    shown=st.integers(1, 40),
    num_layers=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group_size=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([64, 80]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_attention_mass_agrees_with_the_reference(
    device: torch.device,
    context_len: int,
    query_len: int,
    shown: int,
    num_layers: int,
    kv_heads: int,
    group_size: int,
    head_dim: int,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Of the second sequence's last rows."""
    layout, num_blocks = make_layout([50, context_len], [3, query_len], 16, False, seed)
    rows = min(shown, query_len)
    heads = kv_heads * group_size
    # Rows of a wider tensor, as a layer's projections leave them.
    queries = [
        made_up(seed + i, dtype, device, rows, heads + 1, head_dim)[:, :heads].transpose(0, 1)
        for i in range(num_layers)
    ]
    pages = [
        made_up(seed - i, dtype, device, kv_heads, num_blocks * 16, head_dim)
        for i in range(num_layers)
    ]
    actual = triton_mass.attention_mass(queries, pages, layout, 1, 0.125, softcap)
    expected = selection.layered_mass(
        [query.float().cpu() for query in queries],
        [k_cache.float().cpu() for k_cache in pages],
        *(layout, 1, 0.125, softcap),
        mass=selection_reference.attention_mass,
    )
    tolerance = TOLERANCES[dtype] * 10
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)
