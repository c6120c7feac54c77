"""Attention's mass a key in Triton: first each row's log-sum-exp, then the keys' share of it."""

import torch
import triton
import triton.language as tl

from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.triton_tiles import capped, dot_precision, log_sum

_BLOCK_N = 64
_BLOCK_M = 32
_SPLIT_KEYS = 512


@triton.jit
def _tile_scores(
    query,
    k_cache,
    table,
    query_head_stride,
    query_row_stride,
    kv_head_stride,
    kv_head,
    folded,
    keys,
    num_rows,
    num_keys,
    scaling,
    softcap,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 [M, N], base 2, -inf where a row does not see a key, or is none."""
    row = folded // GROUP_SIZE
    head = kv_head * GROUP_SIZE + folded % GROUP_SIZE
    is_row = row < num_rows
    is_key = keys < num_keys
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    query_rows = query + head * query_head_stride + row * query_row_stride
    q = tl.load(query_rows[:, None] + dims[None, :], is_row[:, None] & is_dim[None, :], other=0.0)
    blocks = tl.load(table + keys // BLOCK_SIZE, is_key, other=0)
    slots = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
    offsets = kv_head.to(tl.int64) * kv_head_stride + slots[:, None] * HEAD_DIM + dims[None, :]
    k = tl.load(k_cache + offsets, is_key[:, None] & is_dim[None, :], other=0.0)
    products = tl.dot(q.to(k.dtype), tl.trans(k), input_precision=PRECISION)
    scores = capped(products, scaling, softcap, HAS_SOFTCAP)
    visible = keys[None, :] < num_keys - num_rows + row[:, None] + 1
    return tl.where(visible & is_row[:, None] & is_key[None, :], scores, float("-inf"))


@triton.jit
def _row_lse(
    query,
    k_cache,
    table,
    partial_lse,  # fp32 [num_splits, num_kv_heads, num_rows * group_size]
    query_head_stride,
    query_row_stride,
    kv_head_stride,
    num_rows,
    num_keys,
    scaling,
    softcap,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    folded = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum((split + 1) * SPLIT_KEYS, num_keys)
    for start in tl.range(split * SPLIT_KEYS, stop, BLOCK_N):
        scores = _tile_scores(
            query,
            k_cache,
            table,
            query_head_stride,
            query_row_stride,
            kv_head_stride,
            kv_head,
            folded,
            start + tl.arange(0, BLOCK_N),
            num_rows,
            num_keys,
            scaling,
            softcap,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_SIZE,
            HAS_SOFTCAP,
            PRECISION,
            BLOCK_D,
        )
        higher = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - anchor) + tl.sum(tl.exp2(scores - anchor[:, None]), 1)
        top = higher
    lse = log_sum(top, total)
    num_folded = num_rows * GROUP_SIZE
    place = partial_lse + (split * tl.num_programs(1) + kv_head) * num_folded + folded
    tl.store(place, lse, folded < num_folded)


@triton.jit
def _key_mass(
    query,
    k_cache,
    table,
    lse,  # fp32 [num_kv_heads, num_rows * group_size]
    mass,  # fp32 [num_kv_heads, num_keys]
    query_head_stride,
    query_row_stride,
    kv_head_stride,
    num_rows,
    num_keys,
    scaling,
    softcap,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_head = tl.program_id(1)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_folded = num_rows * GROUP_SIZE
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, num_folded, BLOCK_M):
        folded = start + tl.arange(0, BLOCK_M)
        scores = _tile_scores(
            query,
            k_cache,
            table,
            query_head_stride,
            query_row_stride,
            kv_head_stride,
            kv_head,
            folded,
            keys,
            num_rows,
            num_keys,
            scaling,
            softcap,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_SIZE,
            HAS_SOFTCAP,
            PRECISION,
            BLOCK_D,
        )
        rows = tl.load(lse + kv_head * num_folded + folded, folded < num_folded, other=0.0)
        sums += tl.sum(tl.exp2(scores - rows[:, None]), 0)
    tl.store(mass + kv_head * num_keys + keys, sums, keys < num_keys)


def attention_mass(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See selection.attention_mass."""
    num_kv_heads, num_rows = k_cache.shape[0], query.shape[1]
    num_keys = layout.context_lens[sequence] + layout.query_lens[sequence]
    mass = query.new_empty(num_kv_heads, num_keys, dtype=torch.float32)
    if num_kv_heads == 0:
        return mass
    query = query if query.stride(2) == 1 else query.contiguous()
    group_size, head_dim = query.shape[0] // num_kv_heads, query.shape[2]
    num_folded = num_rows * group_size
    tables = layout.on_device(query.device, num_rows).block_tables
    num_splits = triton.cdiv(num_keys, _SPLIT_KEYS)
    lses = mass.new_empty(num_splits, num_kv_heads, num_folded)
    strides = (query.stride(0), query.stride(1), k_cache.stride(0))
    numbers = (*strides, num_rows, num_keys, scaling, softcap or 1.0)
    shape = {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": layout.block_size,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": dot_precision(k_cache.dtype),
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    grid = (num_splits, num_kv_heads, triton.cdiv(num_folded, _BLOCK_M))
    table = tables[sequence]
    _row_lse[grid](query, k_cache, table, lses, *numbers, SPLIT_KEYS=_SPLIT_KEYS, **shape)
    lse = torch.logsumexp(lses * 0.6931471805599453, dim=0) * 1.4426950408889634
    tiles = (triton.cdiv(num_keys, _BLOCK_N), num_kv_heads)
    _key_mass[tiles](query, k_cache, table, lse, mass, *numbers, **shape)
    return mass
