"""Whether a replay does what it would do if it were launched, where ranks exchange within it."""

import logging

import numpy as np
import torch

from magicdec.attention import PagedAttention, row_positions
from magicdec.graphs.capture import KeptForward
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_NUM_ROWS = 2
_TOLERANCE = 0.05  # of the largest logit: another order of sums, not another sum


@torch.inference_mode()
def replays_agree(
    forward: KeptForward,
    cache: PagedKVCache,
    backend: AttentionBackend,
    graphs: ForwardGraphs,
    vocabulary: Vocabulary,
) -> bool:
    """By a step of one sequence over other tokens than those it was captured with.

    Ranks call it together and hear the same. Writes to block 0.
    """
    layout = PagedLayout((_NUM_ROWS,), (0,), (np.zeros(1, dtype=np.int64),), cache.block_size)
    keep = torch.arange(_NUM_ROWS)
    differences = []
    for first in (0, _NUM_ROWS):
        token_ids = torch.arange(first, first + _NUM_ROWS)
        replayed = graphs.forward(layout, token_ids, keep)
        attention = PagedAttention(cache, layout, backend)
        launched = forward(token_ids, row_positions(layout), attention, keep)
        largest = (replayed - launched).float().abs().amax()
        differences.append(largest / launched.float().abs().amax())
    # NaN where one is: a tensor's maximum keeps it, Python's may not.
    worst = float(vocabulary.greatest(torch.stack(differences).amax()[None]))
    if not worst <= _TOLERANCE:
        logger.warning("replayed steps are off by %.3g of the logits: steps are launched", worst)
    return worst <= _TOLERANCE
