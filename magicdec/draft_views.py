"""A round's draft budgets, divided between the recent window and what was selected."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.config import SelectionConfig
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.sparse_kv import Selection, layer_budget

_NEVER = -1  # the observed_len of a sequence without a selection


@dataclass(frozen=True, slots=True)
class DraftViews:
    """What the draft steps of one round may read, sequence by sequence."""

    layout: PagedLayout  # context_lens: positions whose K/V are in the pages
    config: SelectionConfig
    draft_length: int  # steps of the round, whose rows are of the budget
    draft_budgets: Sequence[int]
    selections: Sequence[Selection | None]  # None: streaming

    def divide(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys of sink and recent window, and most of the selection's, in a layer: [batch] each.

        The recent window grows by the tokens since the selection, up to half of what the sink
        leaves.
        """
        config, context_lens = self.config, np.array(self.layout.context_lens)
        budgets = [layer_budget(config, layer, budget) for budget in self.draft_budgets]
        num_keys = np.array(budgets) - self.draft_length
        observed_lens = np.array(
            [
                _NEVER if s is None or layer not in s.positions else s.observed_len
                for s in self.selections
            ]
        )
        grown = config.num_recent_tokens + context_lens - observed_lens
        most = (num_keys - config.num_sink_tokens) // 2
        num_recent = np.maximum(np.minimum(grown, most), config.num_recent_tokens)
        selects = (observed_lens != _NEVER) & (context_lens > num_keys)
        num_window = np.where(selects, config.num_sink_tokens + num_recent, num_keys)
        return num_window, np.maximum(num_keys - num_window, 0)
