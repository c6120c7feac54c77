"""What stands between a layer's linears, in Triton, rounded where transformers rounds."""

import torch
import triton
import triton.language as tl

from magicdec.kernels.head_norms import HeadNorms
from magicdec.kernels.triton_tiles import begin, early_launch, rounded

_BLOCK = 1024


@triton.jit
def _rms_norm(
    rows,
    residual,
    summed,
    weight,
    output,
    num_dims,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    is_dim = dims < num_dims
    place = row * num_dims + dims
    entries = tl.load(rows + place, is_dim, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        entries += tl.load(residual + place, is_dim, other=0.0).to(tl.float32)
        entries = rounded(entries, summed)
        tl.store(summed + place, entries.to(summed.dtype.element_ty), is_dim)
    scale = tl.rsqrt(tl.sum(entries * entries, 0) / num_dims + epsilon)
    weights = tl.load(weight + dims, is_dim, other=0.0).to(tl.float32)
    normed = weights * rounded(entries * scale, output)
    tl.store(output + place, normed.to(output.dtype.element_ty), is_dim)


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
    turned = rounded(first * cos1, rows) - rounded(second * sin1, rows)
    tl.store(place, turned.to(rows.dtype.element_ty), is_half)
    turned = rounded(second * cos2, rows) + rounded(first * sin2, rows)
    tl.store(place + half, turned.to(rows.dtype.element_ty), is_half)


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


@triton.jit
def _silu_product(
    rows,
    output,
    num_dims,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_dim = dims < num_dims
    gates = tl.load(rows + row * 2 * num_dims + dims, is_dim, other=0.0).to(tl.float32)
    rest = tl.load(rows + row * 2 * num_dims + num_dims + dims, is_dim, other=0.0).to(tl.float32)
    product = rounded(gates * tl.sigmoid(gates), output) * rest
    tl.store(output + row * num_dims + dims, product.to(output.dtype.element_ty), is_dim)


class TritonElementwise:
    """Of one GPU and one dtype; tensors are there, of that dtype, and contiguous."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See reference.rms_norm."""
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        _norm(rows, rows, rows, weight, output, epsilon, has_residual=False)
        return output

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See reference.add_rms_norm."""
        rows, residual = rows.contiguous(), residual.contiguous()
        output, summed = torch.empty_like(rows), torch.empty_like(rows)
        _norm(rows, residual, summed, weight, output, epsilon, has_residual=True)
        return output, summed

    def rotate(
        self,
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

    def silu_product(self, rows: torch.Tensor) -> torch.Tensor:
        """See reference.silu_product."""
        rows = rows.contiguous()
        num_dims = rows.shape[-1] // 2
        output = rows.new_empty(*rows.shape[:-1], num_dims)
        grid = (output.numel() // num_dims, triton.cdiv(num_dims, _BLOCK))
        _silu_product[grid](
            rows,
            output,
            num_dims,
            BLOCK=_BLOCK,
            num_warps=4,
            **early_launch(rows.device),
        )
        return output


def _norm(
    rows: torch.Tensor,
    residual: torch.Tensor,
    summed: torch.Tensor,
    weight: torch.Tensor,
    output: torch.Tensor,
    epsilon: float,
    *,
    has_residual: bool,
) -> None:
    num_dims = rows.shape[-1]
    _rms_norm[(rows.numel() // num_dims,)](
        *(rows, residual, summed, weight, output, num_dims, epsilon),
        HAS_RESIDUAL=has_residual,
        BLOCK=triton.next_power_of_2(num_dims),
        num_warps=4,
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
