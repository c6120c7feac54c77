"""A round's draft budgets, divided between the recent window and what was selected."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdec.config import SelectionConfig
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.view_columns import divide_columns
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
    num_ahead: int = 0  # tokens that contexts may be longer by when the views are read

    def num_keys(self, layer: int) -> NDArray[np.int64]:
        """Most keys that are listed in a layer, [batch]: the steps' own rows are of the budget."""
        budgets = [layer_budget(self.config, layer, budget) for budget in self.draft_budgets]
        return np.array(budgets) - self.draft_length

    def divide(self, layer: int, ahead: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """divide_columns() of a layer, where contexts are `ahead` tokens longer: [batch] each."""
        config, context_lens = self.config, np.array(self.layout.context_lens) + ahead
        observed_lens = np.array(
            [
                _NEVER if s is None or layer not in s.positions else s.observed_len
                for s in self.selections
            ]
        )
        return divide_columns(
            context_lens,
            self.num_keys(layer),
            observed_lens,
            config.num_sink_tokens,
            config.num_recent_tokens,
        )

    def most_columns(self, layer: int, num_selected: NDArray[np.int32]) -> int:
        """The most that one of the sequences lists in a layer, while contexts are at most num_ahead
        tokens longer; it takes so many of its selection, -1 where it has none: [batch]."""
        context_lens, num_keys = np.array(self.layout.context_lens), self.num_keys(layer)
        num_window, num_chosen = self.divide(layer, self.num_ahead)
        longest = context_lens + self.num_ahead
        columns = np.minimum(num_window, longest) + np.clip(num_selected, 0, num_chosen)
        # On the way to where it selects, a context is as long as fits.
        fits = (context_lens <= num_keys) & (longest > num_keys)
        return int(np.where(fits, num_keys, columns).max())
