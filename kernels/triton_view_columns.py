"""A round's draft views in one launch: which slots each layer, KV head and sequence reads.

    program   (columns, layer and KV head, sequence)

The first head's programs write the layer's mask. A selection is read where it was made, through
its address: a round sends no list of its own for it.
"""

import torch
import triton
import triton.language as tl

from magicdec.kernels.view_columns import ViewColumns

_BLOCK = 256  # columns of a program


@triton.jit
def _list_columns(
    slots,  # int64 [num_layers, num_heads, batch, num_columns]
    masks,  # [num_layers, batch, mask_stride]
    sequences,  # int64 [batch, 5], see ViewColumns
    layers,  # int32 [batch, num_layers, 4]
    block_tables,  # int32
    num_layers,
    num_heads,
    num_columns,
    mask_stride,
    num_sink,
    num_recent,
    num_slots,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    sequence = tl.program_id(2)
    batch = tl.num_programs(2)
    about = sequences + sequence * 5
    selected = tl.load(about).to(tl.pointer_type(tl.int64))
    most = tl.load(about + 1)
    context_len = tl.load(about + 2).to(tl.int32)
    table = block_tables + tl.load(about + 3)
    observed_len = tl.load(about + 4).to(tl.int32)
    about_layer = layers + (sequence * num_layers + layer) * 4
    num_taken = tl.load(about_layer)
    num_keys = tl.load(about_layer + 1)
    # As view_columns.divide_columns.
    grown = tl.minimum(num_recent + context_len - observed_len, (num_keys - num_sink) // 2)
    selects = (num_taken >= 0) & (context_len > num_keys)
    num_window = tl.where(selects, num_sink + tl.maximum(grown, num_recent), num_keys)
    num_selected = tl.where(selects, tl.minimum(num_taken, tl.maximum(num_keys - num_window, 0)), 0)
    num_window = tl.minimum(num_window, context_len)
    place = tl.load(about_layer + 2) + head * tl.load(about_layer + 3) + column

    is_column = column < num_columns
    is_listed = is_column & (column < num_selected + num_window)
    is_selected = is_column & (column < num_selected)
    # Of a head that the layer does not have, the places may be behind all others.
    chosen = tl.load(selected + place, is_selected & (place < most), other=0).to(tl.int32)
    window = column - num_selected
    window += tl.where(window >= num_sink, context_len - num_window, 0)
    position = tl.where(is_selected, chosen, window)
    block = tl.load(table + position // BLOCK_SIZE, is_listed, other=0).to(tl.int64)
    slot = head.to(tl.int64) * num_slots + block * BLOCK_SIZE + position % BLOCK_SIZE
    row = (tl.program_id(1) * batch + sequence).to(tl.int64) * num_columns
    tl.store(slots + row + column, tl.where(is_listed, slot, 0), is_column)
    hidden = tl.where(is_listed, 0.0, float("-inf")).to(masks.dtype.element_ty)
    row = (layer * batch + sequence).to(tl.int64) * mask_stride
    tl.store(masks + row + column, hidden, column < tl.where(head == 0, num_columns, 0))


def list_columns(slots: torch.Tensor, masks: torch.Tensor, columns: ViewColumns) -> None:
    """See view_columns.ListColumns. All tensors are contiguous."""
    num_layers, num_heads, batch, num_columns = slots.shape
    _list_columns[(triton.cdiv(num_columns, _BLOCK), num_layers * num_heads, batch)](
        *(slots, masks, columns.sequences, columns.layers, columns.block_tables),
        *(num_layers, num_heads, num_columns, masks.shape[2]),
        *(columns.num_sink_tokens, columns.num_recent_tokens, columns.num_slots),
        BLOCK_SIZE=columns.block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
