"""Where the K/V of made-up sequences lie."""

import numpy as np

from magicdec.kernels.paged_layout import PagedLayout


def make_layout(
    context_lens: list[int], query_lens: list[int], block_size: int, contiguous: bool, seed: int
) -> tuple[PagedLayout, int]:
    counts = [-(-(c + q) // block_size) for c, q in zip(context_lens, query_lens, strict=True)]
    num_blocks = sum(counts) + 2
    order = np.arange(1, num_blocks)
    if not contiguous:
        np.random.default_rng(seed).shuffle(order)
    tables = tuple(np.split(order[: sum(counts)], np.cumsum(counts)[:-1]))
    return PagedLayout(tuple(query_lens), tuple(context_lens), tables, block_size), num_blocks
