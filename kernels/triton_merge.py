"""The last step of attention whose keys were split, in Triton (flash-decoding)."""

import torch
import triton
import triton.language as tl

from magicdec.kernels.triton_tiles import begin, early_launch


@triton.jit
def merge_splits(
    partial_output,
    partial_lse,
    output,
    rows,  # int32 [grid's first axis]
    num_query_heads,
    num_splits,
    output_head_stride,
    output_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """A program a row and query head; a split at -inf is not read."""
    begin(IS_EARLY)
    row = tl.load(rows + tl.program_id(0))
    head = tl.program_id(1)
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    start = (row * num_query_heads + head) * num_splits
    lse = tl.load(partial_lse + start + splits, splits < num_splits, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    offsets = (start + splits).to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    is_entry = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial_output + offsets, is_entry, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    place = output + row * output_row_stride + head * output_head_stride + dims
    tl.store(place, merged.to(output.dtype.element_ty), dims < HEAD_DIM)


def launch_merge(
    outputs: torch.Tensor,
    lses: torch.Tensor,
    output: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    rows: torch.Tensor,
    num_splits: int,
) -> None:
    num_heads, _, head_dim = output.shape
    merge_splits[(len(rows), num_heads)](
        outputs,
        lses,
        output,
        rows,
        num_heads,
        num_splits,
        output.stride(0),
        output.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_S=triton.next_power_of_2(num_splits),
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
        **early_launch(output.device),
    )
