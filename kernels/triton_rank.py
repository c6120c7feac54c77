"""The key of a rank among a row's entries in Triton, found by counting what reaches a pivot.

Keys are int32 that order as the fp32 they are made of do, zeros of both signs as one. A row is read
in whole aligned 16 bytes, which no allocation ends within: `lead` entries lie before it in the
first of them.
"""

import triton
import triton.language as tl


@triton.jit
def load_keys(source, start, block, lead, length, flip):
    """Keys, positions and whether these are any, of source's entries from `start` on. `flip` is
    0x7FFFFFFF where they are fp32's bits, and 0 where they are keys."""
    end = (lead + length + 3) // 4 * 4
    loaded = tl.load(source + (start + block), start + block < end, other=0)
    keys = loaded ^ ((loaded >> 31) & flip)
    positions = start + block - lead
    is_entry = (positions >= 0) & (positions < length)
    return tl.where(keys == -1, 0, keys), positions, is_entry


@triton.jit
def narrowed(low, high, num_from_low, num_above, wanted, pivot1, pivot2, pivot3, num1, num2, num3):
    """low..high, which holds the key of rank `wanted`, as the counts of ascending pivots tell."""
    num_from_low = tl.where(num1 >= wanted, num1, num_from_low)
    low = tl.where(num1 >= wanted, pivot1, low)
    num_from_low = tl.where(num2 >= wanted, num2, num_from_low)
    low = tl.where(num2 >= wanted, pivot2, low)
    num_from_low = tl.where(num3 >= wanted, num3, num_from_low)
    low = tl.where(num3 >= wanted, pivot3, low)
    num_above = tl.where(num3 < wanted, num3, num_above)
    high = tl.where(num3 < wanted, pivot3 - 1, high)
    num_above = tl.where(num2 < wanted, num2, num_above)
    high = tl.where(num2 < wanted, pivot2 - 1, high)
    num_above = tl.where(num1 < wanted, num1, num_above)
    high = tl.where(num1 < wanted, pivot1 - 1, high)
    return low, high, num_from_low, num_above


@triton.jit
def search(
    source,
    lead,
    length,
    flip,
    wanted,
    enough,
    low,  # int64
    high,
    num_from_low,  # keys of at least `low`
    num_above,  # keys above `high`
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Narrows low..high to the key of rank `wanted`, or until no more than `enough` reach low."""
    block = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    while (low < high) & (num_from_low > enough):
        pivot1 = low + ((high - low + 3) >> 2)
        pivot2 = low + ((2 * (high - low) + 3) >> 2)
        pivot3 = low + ((3 * (high - low) + 3) >> 2)
        counts1 = tl.zeros([LANES], tl.int32)
        counts2 = tl.zeros([LANES], tl.int32)
        counts3 = tl.zeros([LANES], tl.int32)
        for start in tl.range(0, lead + length, PARTS * LANES):
            keys, _, is_entry = load_keys(source, start, block, lead, length, flip)
            keys = tl.where(is_entry, keys, -0x80000000)  # below every pivot
            counts1 += tl.sum((keys >= pivot1.to(tl.int32)).to(tl.int32), 0)
            counts2 += tl.sum((keys >= pivot2.to(tl.int32)).to(tl.int32), 0)
            counts3 += tl.sum((keys >= pivot3.to(tl.int32)).to(tl.int32), 0)
        # One sum of all lanes, and its barriers, for the three counts.
        pairs = tl.join(tl.join(counts1, counts3), tl.join(counts2, counts2))
        ends, middles = tl.split(tl.sum(pairs, 0))
        num1, num3 = tl.split(ends)
        num2, _ = tl.split(middles)
        low, high, num_from_low, num_above = narrowed(
            *(low, high, num_from_low, num_above, wanted),
            *(pivot1, pivot2, pivot3, num1, num2, num3),
        )
    return low, high, num_from_low, num_above


@triton.jit
def sampled_bounds(
    source,  # of fp32's bits
    lead,
    length,  # more than PARTS * LANES
    wanted,
    sample,  # room for PARTS * LANES keys
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Two keys, int64: the key of rank `wanted` is from the first on and below the second where
    the sample is off by less than 4.5 standard deviations of that rank in it."""
    size: tl.constexpr = PARTS * LANES
    lane = tl.arange(0, size)
    # Scattered within equal parts of the row: what repeats in it misleads no sample.
    place = (lane.to(tl.int64) * length // size).to(tl.int32)
    place += (lane * 40503 >> 7) % (length // size)
    bits = tl.load(source + lead + place)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(keys == -1, 0, keys)
    tl.store(sample + lane, keys)
    tl.debug_barrier()
    num_sampled, none = tl.full([], size, tl.int32), tl.full([], 0, tl.int32)
    least, most = tl.min(keys, 0).to(tl.int64), tl.max(keys, 0).to(tl.int64)
    rank = wanted.to(tl.float32) * size / length
    margin = 4.5 * tl.sqrt(rank) + 4.0
    above = tl.maximum(rank - 1.5 * margin, 0.0).to(tl.int32)
    below = (rank + margin).to(tl.int32) + 1
    # Of a rank outside the sample, what bounds all keys.
    low = tl.where(below > size, none.to(tl.int64) - 0x80000000, least)
    high = tl.where(above < 1, none.to(tl.int64) + 0x7FFFFFFF, most)
    lower, _, num_from_lower, _ = search(
        *(sample, none, num_sampled, none, below, (rank + 1.5 * margin).to(tl.int32) + 1),
        *(low, most, num_sampled, none, PARTS, LANES),
    )
    upper, _, _, _ = search(
        *(sample, none, num_sampled, none, above, tl.maximum(rank - margin, 0.0).to(tl.int32)),
        *(lower, high, num_from_lower, none, PARTS, LANES),
    )
    tl.debug_barrier()
    return lower, tl.minimum(upper + 1, 0x7FFFFFFF)
