"""Rotations of heads and the storing of K/V rows in Triton: one launch does both.

    heads of a row   | query            | key                  | value
    become           | turned, in place | turned, in the pages | the same, in the pages

Rows that go to no pages (a draft's, whose attention keeps them) have their keys turned in place.
"""

import torch
import triton
import triton.language as tl

from magicdec.kernels.head_norms import HeadNorms
from magicdec.kernels.triton_tiles import begin, early_launch, rounded


@triton.jit
def _turned(
    rows,
    cosines,
    sines,
    norm_weights,
    place,  # of the head's first half, [BLOCK]
    row,
    head,
    epsilon,
    HAS_NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both halves of a head in the rows' dtype."""
    halves = tl.arange(0, BLOCK)
    half = HEAD_DIM // 2
    is_half = halves < half
    turns = row * HEAD_DIM + halves
    first = tl.load(place, is_half, other=0.0).to(tl.float32)
    second = tl.load(place + half, is_half, other=0.0).to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
        scale = tl.rsqrt(squares / HEAD_DIM + epsilon)
        weights = norm_weights + head * HEAD_DIM + halves
        weight1 = tl.load(weights, is_half, other=0.0).to(tl.float32)
        weight2 = tl.load(weights + half, is_half, other=0.0).to(tl.float32)
        first = rounded(weight1 * rounded(first * scale, rows), rows)
        second = rounded(weight2 * rounded(second * scale, rows), rows)
    cos1 = tl.load(cosines + turns, is_half, other=0.0).to(tl.float32)
    cos2 = tl.load(cosines + half + turns, is_half, other=0.0).to(tl.float32)
    sin1 = tl.load(sines + turns, is_half, other=0.0).to(tl.float32)
    sin2 = tl.load(sines + half + turns, is_half, other=0.0).to(tl.float32)
    turned1 = rounded(first * cos1, rows) - rounded(second * sin1, rows)
    turned2 = rounded(second * cos2, rows) + rounded(first * sin2, rows)
    return turned1.to(rows.dtype.element_ty), turned2.to(rows.dtype.element_ty)


@triton.jit
def _rotate(
    rows,
    cosines,
    sines,
    norm_weights,
    row_stride,
    epsilon,
    HAS_NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    halves = tl.arange(0, BLOCK)
    half = HEAD_DIM // 2
    is_half = halves < half
    place = rows + row * row_stride + head * HEAD_DIM + halves
    turned1, turned2 = _turned(
        rows, cosines, sines, norm_weights, place, row, head, epsilon, HAS_NORMS, HEAD_DIM, BLOCK
    )
    tl.store(place, turned1, is_half)
    tl.store(place + half, turned2, is_half)


@triton.jit
def _rotate_and_store(
    rows,
    cosines,
    sines,
    norm_weights,
    k_cache,
    v_cache,
    slot_mapping,
    row_stride,
    kv_head_stride,
    num_heads,
    num_kv_heads,
    epsilon,
    HAS_NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    halves = tl.arange(0, BLOCK)
    half = HEAD_DIM // 2
    is_half = halves < half
    slot = tl.load(slot_mapping + row).to(tl.int64)
    is_stored = halves < tl.where(slot >= 0, half, 0)
    place = rows + row * row_stride + head * HEAD_DIM + halves
    num_turned = num_heads + num_kv_heads
    kv_head = tl.where(head < num_turned, head - num_heads, head - num_turned).to(tl.int64)
    page = kv_head * kv_head_stride + slot * HEAD_DIM + halves
    if head < num_turned:
        turned1, turned2 = _turned(
            *(rows, cosines, sines, norm_weights, place, row, head, epsilon),
            HAS_NORMS,
            HEAD_DIM,
            BLOCK,
        )
        if head < num_heads:
            tl.store(place, turned1, is_half)
            tl.store(place + half, turned2, is_half)
        else:
            tl.store(k_cache + page, turned1.to(k_cache.dtype.element_ty), is_stored)
            tl.store(k_cache + page + half, turned2.to(k_cache.dtype.element_ty), is_stored)
    else:
        first = tl.load(place, is_half)
        second = tl.load(place + half, is_half)
        tl.store(v_cache + page, first.to(v_cache.dtype.element_ty), is_stored)
        tl.store(v_cache + page + half, second.to(v_cache.dtype.element_ty), is_stored)


@triton.jit
def _store_kv(
    k_cache,
    v_cache,
    key,
    value,
    slot_mapping,
    kv_head_stride,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    is_dim = dims < tl.where(slot >= 0, HEAD_DIM, 0)
    place = head * kv_head_stride + slot * HEAD_DIM + dims
    one = tl.load(key + head * key_head_stride + row * key_row_stride + dims, is_dim)
    tl.store(k_cache + place, one.to(k_cache.dtype.element_ty), is_dim)
    one = tl.load(value + head * value_head_stride + row * value_row_stride + dims, is_dim)
    tl.store(v_cache + place, one.to(v_cache.dtype.element_ty), is_dim)


def rotate(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """See reference.rotate; `rows` themselves are rotated and returned."""
    num_rows, head_dim = cos.shape
    _rotate[(num_rows, num_heads)](
        rows,
        cos.contiguous(),
        sin.contiguous(),
        cos if norms is None else norms.weights,
        rows.stride(0),
        0.0 if norms is None else norms.epsilon,
        HAS_NORMS=norms is not None,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        **early_launch(rows.device),
    )
    return rows


def rotate_and_store(
    rows: torch.Tensor,  # [num_rows, heads of query, key and value]
    cos: torch.Tensor,  # [num_rows, head_dim]
    sin: torch.Tensor,
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,  # [num_rows]
    norms: HeadNorms | None = None,
) -> None:
    """See layer_dispatch.RotateAndStore."""
    num_rows, head_dim = cos.shape
    num_kv_heads = len(k_cache)
    num_heads = rows.shape[1] // head_dim
    _rotate_and_store[(num_rows, num_heads)](
        rows,
        cos.contiguous(),
        sin.contiguous(),
        cos if norms is None else norms.weights,
        *(k_cache, v_cache, slot_mapping, rows.stride(0), k_cache.stride(0)),
        *(num_heads - 2 * num_kv_heads, num_kv_heads),
        0.0 if norms is None else norms.epsilon,
        HAS_NORMS=norms is not None,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        **early_launch(rows.device),
    )


def store_kv(
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    key: torch.Tensor,  # [num_kv_heads, num_rows, head_dim]
    value: torch.Tensor,
    slot_mapping: torch.Tensor,  # [num_rows]
) -> None:
    """See kv_store.store_kv. A row whose slot is below 0 goes nowhere."""
    num_kv_heads, num_rows, head_dim = key.shape
    if key.numel() == 0:
        return
    key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (key, value))
    _store_kv[(num_rows, num_kv_heads)](
        *(k_cache, v_cache, key, value, slot_mapping, k_cache.stride(0)),
        *(*key.stride()[:2], *value.stride()[:2]),
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=1,
        **early_launch(k_cache.device),
    )
