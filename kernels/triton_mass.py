"""Attention's mass a key in Triton: first each row's log-sum-exp, then the keys' share of it.

    program   (split or tile of keys, layer and KV head, tile of rows)

All layers in two launches: a layer's rows and keys lie so many entries from the first layer's, a
multiple of 8, as wide loads ask for.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.transfer import send
from magicdec.kernels.triton_tiles import capped, dot_precision, log_sum

_BLOCK_N = 64
_BLOCK_M = 32
_SPLIT_KEYS, _MOST_SPLITS = 512, 16  # at least; each tile of keys adds up all splits' sums
# One compilation serves all of them: a request would wait for the next.
_COUNTS = ("num_layers", "num_kv_heads", "num_rows", "num_keys", "num_splits", "split_keys")


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


@triton.jit(do_not_specialize=_COUNTS)
def _row_lse(
    query,  # of the first layer
    k_cache,
    distances,  # int64 [2, num_layers], of the others' query and keys
    table,
    partial_lse,  # fp32 [num_splits, num_layers * num_kv_heads, num_rows * group_size]
    query_head_stride,
    query_row_stride,
    kv_head_stride,
    num_layers,
    num_kv_heads,
    num_rows,
    num_keys,
    split_keys,
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
    split = tl.program_id(0)
    layer = tl.program_id(1) // num_kv_heads
    kv_head = tl.program_id(1) % num_kv_heads
    query += tl.multiple_of(tl.load(distances + layer), 8)
    k_cache += tl.multiple_of(tl.load(distances + num_layers + layer), 8)
    folded = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum((split + 1) * split_keys, num_keys)
    for start in tl.range(split * split_keys, stop, BLOCK_N):
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
    num_folded = num_rows * GROUP_SIZE
    place = partial_lse + (split * tl.num_programs(1) + tl.program_id(1)) * num_folded + folded
    tl.store(place, log_sum(top, total), folded < num_folded)


@triton.jit
def _whole_lse(partial_lse, num_splits, split_stride, is_row):
    """Of rows at `partial_lse` in every split, base 2; every row sees a key in one of them."""
    top = tl.full(is_row.shape, float("-inf"), tl.float32)
    for split in tl.range(0, num_splits):
        top = tl.maximum(top, tl.load(partial_lse + split * split_stride, is_row, other=0.0))
    total = tl.zeros(is_row.shape, tl.float32)
    for split in tl.range(0, num_splits):
        total += tl.exp2(tl.load(partial_lse + split * split_stride, is_row, other=0.0) - top)
    return top + tl.log2(total)


@triton.jit(do_not_specialize=_COUNTS)
def _key_mass(
    query,  # of the first layer
    k_cache,
    distances,  # int64 [2, num_layers], of the others' query and keys
    table,
    partial_lse,  # fp32 [num_splits, num_layers * num_kv_heads, num_rows * group_size]
    mass,  # fp32 [num_layers * num_kv_heads, num_keys]
    query_head_stride,
    query_row_stride,
    kv_head_stride,
    num_layers,
    num_kv_heads,
    num_rows,
    num_keys,
    num_splits,
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
    pair = tl.program_id(1)
    layer = pair // num_kv_heads
    kv_head = pair % num_kv_heads
    query += tl.multiple_of(tl.load(distances + layer), 8)
    k_cache += tl.multiple_of(tl.load(distances + num_layers + layer), 8)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_folded = num_rows * GROUP_SIZE
    split_stride = tl.num_programs(1) * num_folded
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
        rows = partial_lse + pair * num_folded + folded
        lse = _whole_lse(rows, num_splits, split_stride, folded < num_folded)
        sums += tl.sum(tl.exp2(scores - lse[:, None]), 0)
    tl.store(mass + pair.to(tl.int64) * num_keys + keys, sums, keys < num_keys)


def attention_mass(
    queries: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See selection.layered_mass."""
    num_heads, num_rows, head_dim = queries[0].shape
    num_layers, num_kv_heads = len(queries), len(k_caches[0])
    num_keys = layout.context_lens[sequence] + layout.query_lens[sequence]
    mass = queries[0].new_empty(num_layers, num_kv_heads, num_keys, dtype=torch.float32)
    if num_kv_heads == 0:
        return mass
    if not all(_is_like(q, queries[0]) for q in queries):
        queries = [q.clone(memory_format=torch.contiguous_format) for q in queries]
    first, pages, group_size = queries[0], k_caches[0], num_heads // num_kv_heads
    split_keys = max(_SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(num_keys, _MOST_SPLITS)))
    num_splits = triton.cdiv(num_keys, split_keys)
    heads, num_folded = num_layers * num_kv_heads, num_rows * group_size
    lses = mass.new_empty(num_splits, heads, num_folded)
    distances = send(torch.tensor([_distances(queries), _distances(k_caches)]), first.device)
    table = layout.on_device(first.device, num_rows).block_tables[sequence]
    numbers = (*first.stride()[:2], pages.stride(0), num_layers, num_kv_heads, num_rows, num_keys)
    constants = {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": layout.block_size,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": dot_precision(pages.dtype),
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    where, limits = (first, pages, distances, table, lses), (scaling, softcap or 1.0)
    grid = (num_splits, heads, triton.cdiv(num_folded, _BLOCK_M))
    _row_lse[grid](*where, *numbers, split_keys, *limits, **constants)
    grid = (triton.cdiv(num_keys, _BLOCK_N), heads, 1)
    _key_mass[grid](*where, mass, *numbers, num_splits, *limits, **constants)
    return mass


def _distances(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Entries from the first one's beginning to each one's."""
    start, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - start) // size for tensor in tensors]


def _is_like(query: torch.Tensor, first: torch.Tensor) -> bool:
    return query.data_ptr() % 32 == 0 and query.stride() == first.stride() and query.stride(2) == 1
