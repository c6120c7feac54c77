"""Paged attention in Triton: a KV head's rows in one tile, its keys split over programs.

    program   (tile and split, KV head, sequence)
    tile      | row 0: its GQA group | row 1: its group | ...    BLOCK_M folded rows
    keys      | split 0 | split 1 | ... | the last, cut short |
    merge     the splits' outputs, weighed by their fp32 log-sum-exp (flash-decoding)

How keys are split depends on a sequence's own length alone: a row's result is the same alone and
among others. Logarithms are of base 2, which is what the processor has.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from magicdec.kernels.paged_layout import DeviceLayout, PagedLayout
from magicdec.kernels.triton_merge import launch_merge
from magicdec.kernels.triton_tiles import (
    begin,
    capped,
    choose_block_m,
    choose_num_warps,
    dot_precision,
    early_launch,
    log_sum,
    weighed,
)

MIN_SPLIT_KEYS = 256
MAX_SPLITS = 32
MAX_ROWS = 32  # of a sequence whose keys are split; longer chunks fill the device by their rows
_BLOCK_N = 64
_NUM_STAGES = 3
_LONG_BLOCK_M = 64  # folded rows of a prompt's chunk


@triton.jit
def _attend(
    query,
    k_cache,
    v_cache,
    output,
    partial_output,  # fp32 [num_rows, num_query_heads, num_splits, head_dim]
    partial_lse,  # fp32 [num_rows, num_query_heads, num_splits]
    sequences,  # int32 [grid's third axis]: which of the layout
    row_starts,
    query_lens,
    context_lens,
    block_tables,
    table_stride,
    query_head_stride,
    query_row_stride,
    output_head_stride,
    output_row_stride,
    kv_head_stride,
    num_query_heads,
    num_splits,
    scaling,
    softcap,
    window,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    tile = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1)
    sequence = tl.load(sequences + tl.program_id(2))
    query_len = tl.load(query_lens + sequence)
    context_len = tl.load(context_lens + sequence)
    row_start = tl.load(row_starts + sequence)
    if tile * BLOCK_M >= query_len * GROUP_SIZE:
        return

    folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = folded // GROUP_SIZE
    head = kv_head * GROUP_SIZE + folded % GROUP_SIZE
    is_row = row < query_len
    position = context_len + row
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM

    num_keys = context_len + query_len
    first = 0
    stop = tl.minimum(context_len + (tile * BLOCK_M + BLOCK_M - 1) // GROUP_SIZE + 1, num_keys)
    if IS_SPLIT:
        size = tl.maximum(MIN_SPLIT, BLOCK_N * tl.cdiv(num_keys, BLOCK_N * MOST_SPLITS))
        first = split * size
        stop = tl.minimum(stop, first + size)
    if HAS_WINDOW:
        oldest = tl.maximum(context_len + tile * BLOCK_M // GROUP_SIZE - window + 1, 0)
        first = tl.maximum(first, oldest // BLOCK_N * BLOCK_N)

    query_rows = query + head * query_head_stride + (row_start + row) * query_row_stride
    q = tl.load(query_rows[:, None] + dims[None, :], is_row[:, None] & is_dim[None, :], other=0.0)
    q = q.to(k_cache.dtype.element_ty)
    head_offset = kv_head.to(tl.int64) * kv_head_stride
    table = block_tables + sequence * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, stop, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < stop
        if BLOCK_SIZE % BLOCK_N == 0:  # a tile lies in one block
            slots = tl.load(table + start // BLOCK_SIZE) * BLOCK_SIZE + keys % BLOCK_SIZE
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE, is_key, other=0)
            slots = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = head_offset + slots[:, None] * HEAD_DIM + dims[None, :]
        is_entry = is_key[:, None] & is_dim[None, :]
        k = tl.load(k_cache + offsets, is_entry, other=0.0)
        v = tl.load(v_cache + offsets, is_entry, other=0.0)
        scores = capped(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scaling, softcap, HAS_SOFTCAP
        )
        visible = (keys[None, :] <= position[:, None]) & is_key[None, :]
        if HAS_WINDOW:
            visible &= position[:, None] - keys[None, :] < window
        scores = tl.where(visible, scores, float("-inf"))
        acc, top, total = weighed(acc, top, total, scores, v, PRECISION)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    is_entry = is_row[:, None] & is_dim[None, :]
    if IS_SPLIT:
        index = ((row_start + row) * num_query_heads + head) * num_splits + split
        tl.store(partial_lse + index, log_sum(top, total), is_row)
        if first < stop:
            partial = partial_output + index.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(partial, out, is_entry)
    else:
        rows = output + head * output_head_stride + (row_start + row) * output_row_stride
        tl.store(rows[:, None] + dims[None, :], out.to(output.dtype.element_ty), is_entry)


def paged_attention(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    v_cache: torch.Tensor,
    layout: PagedLayout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See reference.paged_attention. Prompts' chunks are among the rows too."""
    on_device = layout.on_device(query.device, MAX_ROWS)
    return attend_on_device(query, k_cache, v_cache, on_device, scaling, sliding_window, softcap)


def attend_on_device(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: DeviceLayout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same, of a layout that is there: reads nothing on the host. A sequence may have no
    rows; a row that belongs to none gets any numbers."""
    num_heads, num_rows, head_dim = query.shape
    output = query.new_empty(num_rows, num_heads, head_dim).transpose(0, 1)
    if k_cache.shape[0] == 0 or num_rows == 0:
        return output
    query = query if query.stride(2) == 1 else query.contiguous()
    call = _Call(query, k_cache, v_cache, output, layout, scaling, sliding_window, softcap)
    if len(layout.short) > 0:
        _attend_short(call)
    if len(layout.long) > 0:
        _launch(call, layout.long, layout.most_long_rows, _LONG_BLOCK_M, 1, (output, output))
    return output


@dataclass(frozen=True, slots=True)
class _Call:
    """What paged_attention was asked, its layout on the device."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    output: torch.Tensor
    layout: DeviceLayout
    scaling: float
    sliding_window: int | None
    softcap: float | None

    @property
    def group_size(self) -> int:
        return self.query.shape[0] // self.k_cache.shape[0]


def _attend_short(call: _Call) -> None:
    """Of the layout's short sequences. Reads nothing back."""
    num_heads, num_rows, head_dim = call.query.shape
    layout = call.layout
    num_splits = min(triton.cdiv(layout.most_keys, MIN_SPLIT_KEYS), MAX_SPLITS)
    size = num_rows * num_heads * num_splits
    partial = call.query.new_empty(size * (head_dim + 1), dtype=torch.float32)
    parts = partial[: size * head_dim], partial[size * head_dim :]
    block_m = choose_block_m(layout.most_rows * call.group_size)
    _launch(call, layout.short, layout.most_rows, block_m, num_splits, parts)
    if num_splits > 1:
        launch_merge(*parts, call.output, layout.short_rows, num_splits)


def _launch(
    call: _Call,
    sequences: torch.Tensor,
    most_rows: int,
    block_m: int,
    num_splits: int,
    parts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Over row tiles and splits of the listed sequences; one split writes the output itself."""
    query, output, k_cache, layout = call.query, call.output, call.k_cache, call.layout
    num_tiles = triton.cdiv(most_rows * call.group_size, block_m)
    block_d = triton.next_power_of_2(query.shape[2])
    _attend[(num_tiles * num_splits, k_cache.shape[0], len(sequences))](
        *(query, k_cache, call.v_cache, output, *parts, sequences),
        *(layout.row_starts, layout.query_lens, layout.context_lens),
        *(layout.block_tables, layout.block_tables.stride(0)),
        *(*query.stride()[:2], *output.stride()[:2], k_cache.stride(0)),
        *(query.shape[0], num_splits),
        *(call.scaling, call.softcap or 1.0, call.sliding_window or 0),
        GROUP_SIZE=call.group_size,
        HEAD_DIM=query.shape[2],
        BLOCK_SIZE=layout.block_size,
        MIN_SPLIT=MIN_SPLIT_KEYS,
        MOST_SPLITS=MAX_SPLITS,
        IS_SPLIT=num_splits > 1,
        HAS_SOFTCAP=call.softcap is not None,
        HAS_WINDOW=call.sliding_window is not None,
        PRECISION=dot_precision(k_cache.dtype),
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=block_d,
        num_warps=choose_num_warps(block_m, block_d),
        num_stages=_NUM_STAGES,
        **early_launch(query.device),
    )
