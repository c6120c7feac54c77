"""What the Triton kernels share: how they begin, scores of a tile, the softmax over tiles."""

from functools import cache

import torch
import triton
import triton.language as tl

_LEAST_M = 16  # of a tile that tensor cores multiply


def choose_block_m(num_rows: int) -> int:
    """Rows of a tile that holds so many."""
    return max(_LEAST_M, int(triton.next_power_of_2(num_rows)))


def choose_num_warps(block_m: int, block_d: int) -> int:
    """So that a tile's sums fit a thread's registers, and no warp is idle (H100, heads of 128)."""
    if block_m * block_d > 8192:
        return 8
    return 2 if block_m == 32 and block_d <= 128 else 4


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are whole ones: rounded to tf32, a kernel would not agree with its oracle."""
    return "ieee" if dtype is torch.float32 else "tf32"


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Options to launch a kernel with that calls begin(): from Hopper on it is launched while the
    one before it still runs."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"IS_EARLY": True, "launch_pdl": True}
    return {"IS_EARLY": False}


@triton.jit
def begin(IS_EARLY: tl.constexpr):
    """Before anything is read: the kernel before is done then, and the next one may be launched
    (programmatic dependent launch)."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rounded(values, like):
    """As transformers' modules round between their steps."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def capped(products, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2(e), from products of query and key."""
    scores = products * scaling
    if HAS_SOFTCAP:
        # tanh(x) is 2 sigmoid(2x) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * 1.4426950408889634


@triton.jit
def weighed(acc, top, total, scores, v, PRECISION: tl.constexpr):
    """One more tile of keys under the running softmax (arXiv 2205.14135): acc [M, D] unnormalised,
    top [M] the largest score, total [M] the sum; scores [M, N] base 2, -inf where hidden."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet has nothing to weigh, and nothing to subtract.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def log_sum(top, total):
    """Base 2; -inf where nothing was seen."""
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
