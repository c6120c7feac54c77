"""The largest entries of rows in Triton, in one launch and a sort of what it chose.

    program   (row)
    taken     | held: may be among the largest | chosen |

The last key chosen is found by counting the row's. Of a long row a sample tells two keys that it
almost surely lies between: one pass chooses what is above both and holds what is between, and only
that is counted then. Where the sample misled, or too much lies between (ties), the row is counted.
"""

import torch
import triton
import triton.language as tl

from magicdec.kernels.triton_rank import load_keys, narrowed, sampled_bounds, search

NUM_WARPS = 16
MOST_REGISTERS = 64  # a thread: two rows share a multiprocessor, one counts while the other waits
_NUM_COLUMNS = 128  # that a warp takes of at once: 16 bytes a thread
_NUM_LANES = NUM_WARPS * _NUM_COLUMNS
_MOST_COUNTED = 2 * _NUM_LANES  # entries of a row without a sample, which has as many
_LEAST_HELD, _HELD_SHARE = 2 * _MOST_COUNTED, 16  # of a row with a sample: a 16th of its entries
CONSTANTS = {
    "MOST_COUNTED": _MOST_COUNTED,
    "PARTS": _MOST_COUNTED // _NUM_LANES,
    "LANES": _NUM_LANES,
    "WARPS": NUM_WARPS,
    "COLUMNS": _NUM_COLUMNS,
}
# One compilation serves all of them: a request would wait for the next.
_NUMBERS = ("bits", "row_stride", "num_entries", "num_wanted", "num_held", "width")


@triton.jit
def _ranks(flags):
    """Of [rows, columns], row after row, counted from 1, and how many there are: two counts of less
    than 2^15 at once, one in the upper bits. A warp scans a row by itself."""
    within = tl.cumsum(flags, 1)
    sums = tl.max(within, 1)
    ends = tl.cumsum(sums, 0)
    return within + (ends - sums)[:, None], tl.max(ends, 0)


@triton.jit
def _take_sure(
    bits,
    lead,
    num_entries,
    num_wanted,
    lower,
    upper,
    taken_keys,
    taken,
    num_held,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Chooses what reaches `upper` and holds what reaches `lower` alone, each in order of position
    and as far as there is room. Returns how many reach lower, are above it, and reach upper."""
    above_lower = tl.minimum(lower + 1, upper).to(tl.int32)
    lower, upper = lower.to(tl.int32), upper.to(tl.int32)
    block = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    counts = tl.zeros([WARPS, COLUMNS], tl.int32)
    num_sure, num_between = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in tl.range(0, lead + num_entries, WARPS * COLUMNS):
        keys, positions, is_entry = load_keys(bits, start, block, lead, num_entries, 0x7FFFFFFF)
        counts += (is_entry & (keys >= above_lower)).to(tl.int32)
        is_sure = is_entry & (keys >= upper)
        is_between = is_entry & (keys >= lower) & (keys < upper)
        ranks, last = _ranks(is_sure.to(tl.int32) + (is_between.to(tl.int32) << 16))
        sure, between = num_sure + (ranks & 0xFFFF) - 1, num_between + (ranks >> 16) - 1
        is_taken = (is_sure & (sure < num_wanted)) | (is_between & (between < num_held))
        place = tl.where(is_sure, num_held + sure, between)
        tl.store(taken_keys + place, keys, is_taken)
        tl.store(taken + place, positions, is_taken)
        num_sure += last & 0xFFFF
        num_between += last >> 16
    tl.debug_barrier()
    return num_sure + num_between, tl.sum(counts), num_sure


@triton.jit
def _take_rest(
    source,
    lead,
    length,
    flip,
    wanted,
    low,
    num_from_low,
    num_above,
    held,
    num_held,
    chosen_keys,
    chosen,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Chooses the `wanted` largest: `low` is the last one's key, or no more than these reach it.

    Keys above `low` come first and those equal to it after them, each in order of position.
    """
    num_tied = tl.where(num_from_low > wanted, length, 0)
    low = low.to(tl.int32)
    block = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    num_before, num_ties = tl.full([], 0, tl.int32), num_above
    for start in tl.range(0, lead + length, WARPS * COLUMNS):
        keys, positions, is_entry = load_keys(source, start, block, lead, length, flip)
        is_tie = is_entry & (positions < num_tied) & (keys == low)
        is_above = is_entry & (keys >= low) & (is_tie == 0)
        ranks, last = _ranks(is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16))
        place = tl.where(is_tie, num_ties + (ranks >> 16), num_before + (ranks & 0xFFFF)) - 1
        is_taken = (is_above | is_tie) & (place < wanted)
        is_held = positions < num_held
        listed = tl.load(held + positions, is_taken & is_held, other=0)
        tl.store(chosen_keys + place, keys, is_taken)
        tl.store(chosen + place, tl.where(is_held, listed, positions), is_taken)
        num_before += last & 0xFFFF
        num_ties += last >> 16


@triton.jit(do_not_specialize=_NUMBERS)
def _take_largest(
    bits,  # int32 [num_rows, num_entries], of fp32
    taken_keys,  # int32 [num_rows, width]
    taken,  # int32 [num_rows, width], positions
    row_stride,
    num_entries,
    num_wanted,
    num_held,
    width,  # a multiple of 4, as num_held is
    MOST_COUNTED: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bits += row * row_stride
    lead = ((bits.to(tl.int64) >> 2) & 3).to(tl.int32)
    bits = tl.multiple_of(bits - lead, 16)
    taken_keys = tl.multiple_of(taken_keys + row * width, 16)
    taken += row * width
    low, high = tl.full([], -0x80000000, tl.int64), tl.full([], 0x7FFFFFFF, tl.int64)
    num_above, num_sure = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    num_from_low = num_entries
    num_between = num_sure
    source, length, flip = bits, num_entries, num_sure + 0x7FFFFFFF
    if num_entries > MOST_COUNTED:
        lower, upper = sampled_bounds(bits, lead, num_entries, num_wanted, taken_keys, PARTS, LANES)
        num1, num2, num3 = _take_sure(
            *(bits, lead, num_entries, num_wanted, lower, upper, taken_keys, taken),
            *(num_held, WARPS, COLUMNS),
        )
        low, high, num_from_low, num_above = narrowed(
            *(low, high, num_from_low, num_above, num_wanted),
            *(lower, tl.minimum(lower + 1, upper), upper, num1, num2, num3),
        )
        is_held = (num3 < num_wanted) & (num1 >= num_wanted) & (num1 - num3 <= num_held)
        if is_held:
            source, lead, flip = taken_keys, lead * 0, flip * 0
            length, num_between, num_sure = num1 - num3, num1 - num3, num3
    source = tl.multiple_of(source, 16)
    wanted = num_wanted - num_sure
    low, high, num_from_low, num_above = search(
        *(source, lead, length, flip, wanted, wanted, low, high),
        *(num_from_low - num_sure, num_above - num_sure, PARTS, LANES),
    )
    first = num_held + num_sure
    _take_rest(
        *(source, lead, length, flip, wanted, low, num_from_low, num_above),
        *(taken, num_between, taken_keys + first, taken + first, WARPS, COLUMNS),
    )


def largest_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """See selection.largest_indices; equal entries, zeros of both signs too, by lower position.

    So a row's choice is the same in every run and beside any others. NaNs order nothing, but what
    is chosen are positions of the row, none twice.
    """
    num_rows, num_entries = scores.shape
    if num_rows * count == 0:
        return torch.empty(num_rows, count, dtype=torch.long, device=scores.device)
    bits = (scores if scores.stride(1) == 1 else scores.contiguous()).view(torch.int32)
    num_held = max(_LEAST_HELD, _in_fours(num_entries // _HELD_SHARE))
    num_held = num_held if num_entries > _MOST_COUNTED else 0
    width = num_held + _in_fours(count)
    keys, taken = bits.new_empty(2, num_rows, width)
    _take_largest[(num_rows,)](
        *(bits, keys, taken, bits.stride(0), num_entries, count, num_held, width),
        **CONSTANTS,
        num_warps=NUM_WARPS,
        maxnreg=MOST_REGISTERS,
    )
    chosen = slice(num_held, num_held + count)
    order = keys[:, chosen].sort(dim=1, descending=True, stable=True).indices
    largest: torch.Tensor = taken[:, chosen].gather(1, order).long()
    return largest


def _in_fours(number: int) -> int:
    return (number + 3) // 4 * 4
