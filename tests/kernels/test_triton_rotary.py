"""Triton's rotations agree with their oracle, and with storing in one launch or two."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdec.kernels import reference, triton_rotary
from magicdec.kernels.head_norms import HeadNorms

GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_SLOTS = 32


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("has_norms", [False, True])
def test_rows_are_rotated_and_stored(
    device: torch.device, dtype: torch.dtype, head_dim: int, has_norms: bool
) -> None:
    """Of 3 query and 2 KV heads, with norms or without; no other slot is touched."""
    generator = torch.Generator().manual_seed(head_dim)
    rows = torch.randn(4, 7 * head_dim, generator=generator).to(dtype).to(device)
    angles = torch.randn(4, head_dim // 2, generator=generator).repeat(1, 2)
    cos, sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
    weights = torch.randn(5, head_dim, generator=generator).to(dtype).to(device)
    norms = HeadNorms(weights, 1e-5) if has_norms else None
    expected = reference.rotate(rows, cos, sin, 5, norms)
    k_cache, v_cache = torch.zeros(2, 2, 32, head_dim, dtype=dtype, device=device)
    slots = torch.tensor([9, 0, 31, 4], device=device)
    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    turned = triton_rotary.rotate(rows, cos, sin, 5, norms)
    close(turned, expected)
    heads = expected.view(4, 7, head_dim).transpose(0, 1)
    triton_rotary.store_kv(k_cache, v_cache, heads[3:5], heads[5:7], slots)
    nowhere = torch.full_like(slots, -1)
    triton_rotary.store_kv(k_cache, v_cache, heads[:2] + 1, heads[:2] + 1, nowhere)
    torch.testing.assert_close(k_cache[:, slots], heads[3:5])
    torch.testing.assert_close(v_cache[:, slots], heads[5:7])
    others = torch.ones(32, dtype=torch.bool)
    others[slots.cpu()] = False
    assert not k_cache[:, others].any()
    assert not v_cache[:, others].any()


@settings(GENERATED, max_examples=60)
@given(
    num_heads=st.integers(1, 4),
    num_kv_heads=st.integers(0, 3),
    head_dim=st.sampled_from([32, 64, 80, 96, 128]),
    slots=st.lists(st.integers(-2, NUM_SLOTS - 1), min_size=1, max_size=5, unique=True),
    slot_dtype=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from(DTYPES),
    has_norms=st.booleans(),
    columns_beside=st.sampled_from([0, 16, 40]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 10_000),
)
def test_one_launch_writes_what_two_write_bit_for_bit(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slots: list[int],
    slot_dtype: torch.dtype,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    has_norms: bool,
    columns_beside: int,
    scale: float,
    seed: int,
) -> None:
    """Rows may lie in wider ones, a rank may have no KV head, and slots below 0 are nowhere."""
    counts = (num_heads, num_kv_heads, num_kv_heads)
    num_turned, width, num_rows = num_heads + num_kv_heads, sum(counts) * head_dim, len(slots)
    generator = torch.Generator().manual_seed(seed)

    def made_up(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    wide = made_up(num_rows, width + columns_beside) * scale
    cos, sin = made_up(num_rows, head_dim), made_up(num_rows, head_dim)
    norms = HeadNorms(made_up(num_turned, head_dim), 1e-5) if has_norms else None
    slot_mapping = torch.tensor(slots, dtype=slot_dtype, device=device)
    shape = (2, num_kv_heads, NUM_SLOTS, head_dim)
    before = torch.randn(shape, generator=generator).to(cache_dtype).to(device)

    expected, expected_pages = wide.clone()[:, :width], before.clone()
    triton_rotary.rotate(expected, cos, sin, num_turned, norms)
    heads = expected.view(num_rows, -1, head_dim).transpose(0, 1)
    query, key, value = heads.split_with_sizes(counts)
    triton_rotary.store_kv(expected_pages[0], expected_pages[1], key, value, slot_mapping)

    found, pages = wide.clone()[:, :width], before.clone()
    triton_rotary.rotate_and_store(found, cos, sin, pages[0], pages[1], slot_mapping, norms)
    turned, rest = found.split_with_sizes([num_heads * head_dim, width - num_heads * head_dim], 1)
    same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    same(turned.view(num_rows, num_heads, head_dim).transpose(0, 1), query)
    same(pages, expected_pages)
    same(rest, wide[:, num_heads * head_dim : width])
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in slots]
    same(pages[:, :, untouched], before[:, :, untouched])
