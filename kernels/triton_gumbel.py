"""Choosing tokens in Triton: the random words of every backend, bit for bit, and their noise."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from magicdec.kernels import gumbel
from magicdec.kernels.gumbel import ENTRIES_PER_BLOCK, Draw, Scaling, Winners
from magicdec.kernels.transfer import send

_WORDS = tl.constexpr(ENTRIES_PER_BLOCK)  # of 32 bits
_NONE = tl.constexpr(2**31 - 1)  # an entry that every other one goes before
_BLOCKS = 128  # of Philox a program


@triton.jit
def philox(block, position, role, step, seed):
    """Philox4x64-10 (Salmon et al., SC 2011); all are uint64. Returns four words of 64 bits."""
    c0 = block
    c1 = position
    c2 = role
    c3 = step
    k0 = seed
    k1 = k0 * 0
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0 * 0 + 0xD2E7470EE14C6C93, c0)
        high1 = tl.umulhi(c2 * 0 + 0xCA5A826395121157, c2)
        low0 = c0 * 0xD2E7470EE14C6C93
        low1 = c2 * 0xCA5A826395121157
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B97F4A7C15
        k1 = k1 + 0xBB67AE8584CAA73B
    return c0, c1, c2, c3


@triton.jit
def _noise(word):
    """fp64 -log(-log(u)) of u = (word + 0.5) / 2**32."""
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform))


@triton.jit
def _better(best, entry, other, other_entry):
    """Equal ones fall to the lower entry."""
    wins = (other > best) | ((other == best) & (other_entry < entry))
    return tl.where(wins, other, best), tl.where(wins, other_entry, entry)


@triton.jit
def _choose(
    scores,
    keys,  # int64 [num_rows, 5]: seed, position, role, step, whether there is a draw
    best_values,  # fp64 [num_rows, tiles]; NaN: one is among them
    best_entries,  # int32 [num_rows, tiles], of the whole vocabulary
    row_stride,
    num_entries,
    first_block,  # of Philox, for the first of these scores
    BLOCKS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    seed = tl.load(keys + row * 5).to(tl.uint64, bitcast=True)
    position = tl.load(keys + row * 5 + 1).to(tl.uint64, bitcast=True)
    role = tl.load(keys + row * 5 + 2).to(tl.uint64, bitcast=True)
    step = tl.load(keys + row * 5 + 3).to(tl.uint64, bitcast=True)
    is_drawn = tl.load(keys + row * 5 + 4) != 0
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    zeros = tl.zeros([BLOCKS], tl.uint64)
    counters = (first_block + blocks).to(tl.uint64) + 1
    words = philox(counters, zeros + position, zeros + role, zeros + step, zeros + seed)
    best = tl.full([BLOCKS], float("-inf"), tl.float64)
    entry = tl.full([BLOCKS], _NONE, tl.int32)
    unordered = tl.zeros([BLOCKS], tl.int32)
    for half in tl.static_range(_WORDS):
        word = (words[half // 2] >> (32 * (half % 2))) & 0xFFFFFFFF
        entries = blocks * _WORDS + half
        place = scores + row.to(tl.int64) * row_stride + entries
        score = tl.load(place, entries < num_entries, other=float("-inf")).to(tl.float64)
        unordered |= (score != score).to(tl.int32)
        value = tl.where(is_drawn, score + _noise(word), score)
        known = first_block * _WORDS + entries
        best, entry = _better(best, entry, value, tl.where(value > float("-inf"), known, _NONE))
    best, entry = tl.reduce((best, entry), 0, _better)
    best = tl.where(tl.max(unordered, 0) > 0, float("nan"), best)
    index = row * tl.num_programs(0) + tile
    tl.store(best_values + index, best)
    tl.store(best_entries + index, entry)


def choose_on_device(scores: torch.Tensor, keys: torch.Tensor, first_entry: int = 0) -> Winners:
    """gumbel.gumbel_argmax without a word to the host: `keys` as in draw_keys, on the device."""
    num_rows, num_entries = scores.shape
    tiles = triton.cdiv(num_entries, _BLOCKS * ENTRIES_PER_BLOCK)
    values = scores.new_empty(num_rows, tiles, dtype=torch.float64)
    entries = scores.new_empty(num_rows, tiles, dtype=torch.int32)
    _choose[(tiles, num_rows)](
        scores,
        keys,
        values,
        entries,
        scores.stride(0),
        num_entries,
        first_entry // ENTRIES_PER_BLOCK,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    best = values.amax(dim=1)
    first = entries.masked_fill(values < best[:, None], 2**31 - 1).amin(dim=1)
    return Winners(best, first.long())


def draw_keys(draws: Sequence[Draw | None]) -> torch.Tensor:
    """int64 [num_rows, 5] on the host; the bits of a seed, which may be above 2**63, stay."""
    return torch.from_numpy(gumbel.draw_keys(draws).view(np.int64))


def gumbel_argmax(
    scores: torch.Tensor,
    draws: Sequence[Draw | None],
    first_entry: int = 0,
    scaling: Scaling | None = None,
) -> Winners:
    """See gumbel.gumbel_argmax."""
    gumbel.check_draws(scores, draws, first_entry)
    if len(draws) == 0:
        return gumbel.gumbel_argmax(scores, draws, first_entry)
    scores = scores if scaling is None else scaling.of(scores)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    return choose_on_device(scores, send(draw_keys(draws), scores.device), first_entry)
