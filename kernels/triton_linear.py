"""Linears of few rows in Triton: as long as it takes to read their weights once.

    program n   | weight rows of BLOCK_N outputs, all inputs | -> these outputs of every row

No sum is divided over programs, so what follows on the product (a bias, a residual, a gate) is done
where the sums are, and a row's result does not depend on the rows beside it.
"""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from magicdec.kernels.triton_tiles import begin, early_launch, rounded

MOST_ROWS = 64
BLOCK_N, BLOCK_K = 64, 128
NUM_WARPS = {16: 4, 32: 4, 64: 8}  # by the rows of a tile
_MOST_STAGES = {16: 8, 32: 6, 64: 6}


@triton.jit
def _products(
    rows,
    weight,
    outputs,  # [BLOCK_N] rows of the weight
    num_rows,
    num_inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_M]"""
    inputs = tl.arange(0, BLOCK_K)
    places = tl.arange(0, BLOCK_M)
    is_row = (places < num_rows)[None, :]
    weights = weight + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    entries = rows + places[None, :] * num_inputs + inputs[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        # A step reads each weight once, and its rows again in every program.
        a = tl.load(weights + start, eviction_policy="evict_first")
        b = tl.load(entries + start, is_row, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    rows,
    weight,
    bias,
    residual,
    output,
    num_rows,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = _products(rows, weight, outputs, num_rows, num_inputs, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        sums += tl.load(bias + outputs).to(tl.float32)[:, None]
    places = tl.arange(0, BLOCK_M)
    is_row = (places < num_rows)[None, :]
    place = places[None, :] * num_outputs + outputs[:, None]
    if HAS_RESIDUAL:
        beside = tl.load(residual + place, is_row, other=0.0).to(tl.float32)
        sums = beside + rounded(sums, output)
    tl.store(output + place, sums.to(output.dtype.element_ty), is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_linear(
    rows,
    weight,
    bias,
    output,
    num_rows,
    num_outputs,  # of gates, and of what they let through
    num_inputs,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    # Eight gates, then the eight that they let through, and so on: a thread's sums are of rows r
    # and r + 8 of a tile, so that it has both.
    half: tl.constexpr = BLOCK_N // 2
    first = tl.program_id(0) * half
    inner = tl.arange(0, BLOCK_N)
    dims = first + inner // 16 * 8 + inner % 8
    outputs = dims + inner // 8 % 2 * num_outputs
    sums = _products(rows, weight, outputs, num_rows, num_inputs, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        sums += tl.load(bias + outputs).to(tl.float32)[:, None]
    pairs = tl.reshape(rounded(sums, output), [BLOCK_N // 16, 2, 8, BLOCK_M])
    gates, rest = tl.split(tl.permute(pairs, 0, 2, 3, 1))
    product = rounded(gates * tl.sigmoid(gates), output) * rest
    product = tl.reshape(product, [half, BLOCK_M])
    places = tl.arange(0, BLOCK_M)
    place = places[None, :] * num_outputs + (first + tl.arange(0, half))[:, None]
    tl.store(output + place, product.to(output.dtype.element_ty), (places < num_rows)[None, :])


class TritonLinear:
    """Of one GPU; rows and weights are there, of one dtype, and `fit`."""

    def __init__(self, device: torch.device) -> None:
        self._shared_bytes = 0  # that a program may take; there are none in the interpreter
        if device.type == "cuda":
            utils = driver.active.utils
            index = torch.cuda.current_device() if device.index is None else device.index
            self._shared_bytes = utils.get_device_properties(index)["max_shared_mem"]

    def fits(self, num_rows: int, weight: torch.Tensor) -> bool:
        """Few rows, and whole tiles of a matrix [num_outputs, num_inputs] that has its own back to
        back."""
        num_outputs, num_inputs = weight.shape
        whole = num_outputs % BLOCK_N == 0 and num_inputs % BLOCK_K == 0
        return 0 < num_rows <= MOST_ROWS and whole and weight.is_contiguous()

    def tile_rows(self, num_rows: int) -> int:
        """Of the tile that so many rows are multiplied in."""
        return next(tile for tile in NUM_WARPS if num_rows <= tile)

    def linear(
        self,
        rows: torch.Tensor,  # [..., num_inputs]
        weight: torch.Tensor,  # [num_outputs, num_inputs]
        bias: torch.Tensor | None = None,  # [num_outputs]
        residual: torch.Tensor | None = None,  # [..., num_outputs]
    ) -> torch.Tensor:
        """See reference.linear."""
        rows = rows.contiguous()
        num_outputs, num_inputs = weight.shape
        output = rows.new_empty(*rows.shape[:-1], num_outputs)
        num_rows = rows.numel() // num_inputs
        beside = output if residual is None else residual.contiguous()
        _linear[(num_outputs // BLOCK_N,)](
            *(rows, weight, weight if bias is None else bias, beside, output),
            *(num_rows, num_outputs, num_inputs),
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            **self._tile(num_rows, weight),
        )
        return output

    def gated_linear(
        self,
        rows: torch.Tensor,  # [..., num_inputs]
        weight: torch.Tensor,  # [2 * num_dims, num_inputs], gates first
        bias: torch.Tensor | None = None,  # [2 * num_dims]
    ) -> torch.Tensor:
        """See reference.gated_linear."""
        rows = rows.contiguous()
        num_dims, num_inputs = weight.shape[0] // 2, weight.shape[1]
        output = rows.new_empty(*rows.shape[:-1], num_dims)
        num_rows = rows.numel() // num_inputs
        _gated_linear[(2 * num_dims // BLOCK_N,)](
            *(rows, weight, weight if bias is None else bias, output),
            *(num_rows, num_dims, num_inputs),
            HAS_BIAS=bias is not None,
            **self._tile(num_rows, weight),
        )
        return output

    def _tile(self, num_rows: int, weight: torch.Tensor) -> dict[str, int]:
        """A launch's constants and options."""
        block_m = self.tile_rows(num_rows)
        num_stages = choose_num_stages(block_m, weight.element_size(), self._shared_bytes)
        constants = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        options = {"num_warps": NUM_WARPS[block_m], "num_stages": num_stages}
        return {**constants, **options, **early_launch(weight.device)}


def choose_num_stages(block_m: int, element_bytes: int, shared_bytes: int) -> int:
    """Tiles in flight: a stage is a tile of weights and one of rows, in shared memory."""
    stage_bytes = (BLOCK_N + block_m) * BLOCK_K * element_bytes
    return max(min(_MOST_STAGES[block_m], shared_bytes // stage_bytes), 1)
