"""The draft's attention in Triton: listed slots are read where they are, nothing is copied.

    program   (split, KV head, sequence)        one row a sequence, its GQA group in one tile
    columns   | split 0 of the listed | split 1 | ... | the round's own tokens |

The last program of a head writes the step's own K/V and reads the earlier steps'.
"""

import torch
import triton
import triton.language as tl

from magicdec.kernels import reference
from magicdec.kernels.sparse_attention import CopiedView, DraftView
from magicdec.kernels.triton_merge import launch_merge
from magicdec.kernels.triton_tiles import (
    begin,
    capped,
    choose_block_m,
    dot_precision,
    early_launch,
    log_sum,
    weighed,
)

_SPLIT_KEYS = 128
_BLOCK_N = 64


@triton.jit
def _attend_listed(
    query,
    key,
    value,
    k_cache,
    v_cache,
    slots,  # int64 [num_kv_heads, batch, num_listed], head * num_slots + slot
    own_keys,  # [num_kv_heads, batch, num_own, head_dim]
    own_values,
    mask,  # [batch, num_listed + num_own]
    partial_output,  # fp32 [batch, num_query_heads, num_splits, head_dim]
    partial_lse,
    query_head_stride,
    query_row_stride,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    mask_stride,
    batch,
    num_listed,
    num_own,
    steps,  # int32 [1]
    scaling,
    softcap,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP_SIZE
    sequence = tl.program_id(2)
    step = tl.load(steps)
    group = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP_SIZE + group
    is_row = group < GROUP_SIZE
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM

    query_rows = query + head * query_head_stride + sequence * query_row_stride
    q = tl.load(query_rows[:, None] + dims[None, :], is_row[:, None] & is_dim[None, :], other=0.0)
    q = q.to(k_cache.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pair = kv_head * batch + sequence
    if split < num_splits - 1:
        for start in range(0, SPLIT_KEYS, BLOCK_N):
            columns = split * SPLIT_KEYS + start + tl.arange(0, BLOCK_N)
            is_key = columns < num_listed
            listed = tl.load(slots + pair * num_listed + columns, is_key, other=0)
            offsets = listed[:, None] * HEAD_DIM + dims[None, :]
            is_entry = is_key[:, None] & is_dim[None, :]
            k = tl.load(k_cache + offsets, is_entry, other=0.0)
            v = tl.load(v_cache + offsets, is_entry, other=0.0)
            hidden = tl.load(mask + sequence * mask_stride + columns, is_key, other=float("-inf"))
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = capped(products, scaling, softcap, HAS_SOFTCAP)
            scores += hidden.to(tl.float32)[None, :]
            acc, top, total = weighed(acc, top, total, scores, v, PRECISION)
    else:
        columns = tl.arange(0, BLOCK_OWN)
        offsets = (pair * num_own + columns)[:, None] * HEAD_DIM + dims[None, :]
        is_old = (columns < step)[:, None] & is_dim[None, :]
        is_new = columns == step
        new_key = key + kv_head * key_head_stride + sequence * key_row_stride + dims
        new_value = value + kv_head * value_head_stride + sequence * value_row_stride + dims
        one_key = tl.load(new_key, is_dim, other=0.0).to(k_cache.dtype.element_ty)
        one_value = tl.load(new_value, is_dim, other=0.0).to(k_cache.dtype.element_ty)
        place = (pair * num_own + step) * HEAD_DIM + dims
        tl.store(own_keys + place, one_key, is_dim)
        tl.store(own_values + place, one_value, is_dim)
        k = tl.load(own_keys + offsets, is_old, other=0.0)
        v = tl.load(own_values + offsets, is_old, other=0.0)
        k = tl.where(is_new[:, None], one_key[None, :], k)
        v = tl.where(is_new[:, None], one_value[None, :], v)
        place = mask + sequence * mask_stride + num_listed + columns
        hidden = tl.load(place, columns <= step, other=float("-inf"))
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = capped(products, scaling, softcap, HAS_SOFTCAP)
        scores += hidden.to(tl.float32)[None, :]
        acc, top, total = weighed(acc, top, total, scores, v, PRECISION)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = log_sum(top, total)
    index = (sequence * num_heads + head) * num_splits + split
    tl.store(partial_lse + index, lse, is_row)
    partial = partial_output + index[:, None] * HEAD_DIM + dims[None, :]
    tl.store(partial, out, is_row[:, None] & is_dim[None, :])


class ListedView:
    """See DraftView: the own columns lie beside the pages."""

    def __init__(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, num_own: int
    ) -> None:
        num_kv_heads, batch, _ = slots.shape
        self._k_cache, self._v_cache = k_cache, v_cache
        self._slots = slots.contiguous()
        shape = (2, num_kv_heads, batch, num_own, k_cache.shape[2])
        self._own_keys, self._own_values = k_cache.new_empty(shape)
        most = max(batch, num_own)
        self._numbers = torch.arange(most, dtype=torch.int32, device=k_cache.device)

    @property
    def static(self) -> list[torch.Tensor]:
        """See DeviceView."""
        return [self._own_keys, self._own_values, self._numbers]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: int,
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See DraftView."""
        at = self._numbers[step : step + 1]
        return self.attend_at(query, key, value, at, mask, scaling, softcap)

    def attend_at(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See DeviceView."""
        num_heads, batch, head_dim = query.shape
        num_kv_heads, _, num_listed = self._slots.shape
        num_own, group_size = self._own_keys.shape[2], num_heads // num_kv_heads
        num_splits = triton.cdiv(num_listed, _SPLIT_KEYS) + 1
        size = batch * num_heads * num_splits
        partial = query.new_empty(size * (head_dim + 1), dtype=torch.float32)
        outputs = partial[: size * head_dim]
        lses = partial[len(outputs) :]
        output = query.new_empty(batch, num_heads, head_dim).transpose(0, 1)
        query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
        _attend_listed[(num_splits, num_kv_heads, batch)](
            *(query, key, value, self._k_cache, self._v_cache, self._slots),
            *(self._own_keys, self._own_values, mask, outputs, lses),
            *(s for t in (query, key, value) for s in t.stride()[:2]),
            *(mask.stride(0), batch, num_listed, num_own, step, scaling, softcap or 1.0),
            GROUP_SIZE=group_size,
            HEAD_DIM=head_dim,
            SPLIT_KEYS=_SPLIT_KEYS,
            HAS_SOFTCAP=softcap is not None,
            PRECISION=dot_precision(self._k_cache.dtype),
            BLOCK_M=choose_block_m(group_size),
            BLOCK_N=_BLOCK_N,
            BLOCK_OWN=choose_block_m(num_own),
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
            num_stages=2,
            **early_launch(query.device),
        )
        launch_merge(outputs, lses, output, self._numbers[:batch], num_splits)
        return output


def make_view(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, num_own: int
) -> DraftView:
    """See sparse_attention.MakeView."""
    if k_cache.shape[0] == 0:
        return CopiedView(reference.gathered_attention, k_cache, v_cache, slots, num_own)
    return ListedView(k_cache, v_cache, slots, num_own)
