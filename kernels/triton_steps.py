"""What stands between a layer's linears, in Triton, rounded where transformers rounds."""

import torch
import triton
import triton.language as tl

from magicdec.kernels.triton_rotary import rotate, rotate_and_store
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

    rotate = staticmethod(rotate)
    rotate_and_store = staticmethod(rotate_and_store)

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
