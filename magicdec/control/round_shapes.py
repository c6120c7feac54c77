"""What the forwards of a round compute, as the cost model counts it."""

import math

import numpy as np

from magicdec.config import SpeculativeConfig
from magicdec.cost_model import Floats, StepShape
from magicdec.draft_choice import TRAITS
from magicdec.roofline import ModelGeometry


class RoundShapes:
    """StepShapes of the parts of a round; `contexts` are [num_sequences]."""

    def __init__(self, geometry: ModelGeometry, config: SpeculativeConfig) -> None:
        self._bytes_per_token = float(geometry.kv_bytes_per_token)
        windows = geometry.sliding_windows or (None,)
        self._windows = [  # and the share of the layers that have it
            (math.inf if window is None else float(window), windows.count(window) / len(windows))
            for window in dict.fromkeys(windows)
        ]
        self._max_draft_budget = config.max_draft_budget
        draft_model = config.draft_model
        window = draft_model.window if draft_model is not None else None
        self._draft_model_reads = math.inf if window is None else float(window)

    def rows(self, contexts: Floats, num_rows: int | Floats = 1) -> StepShape:
        """A forward of so many rows a sequence, all alike or [num_sequences]."""
        seen, count = self._seen(contexts), len(contexts)
        total = float(seen.sum())
        if isinstance(num_rows, int):
            return StepShape(
                num_rows * count, total * self._bytes_per_token, num_rows * total, count
            )
        products = float(num_rows @ seen)
        return StepShape(int(num_rows.sum()), total * self._bytes_per_token, products, count)

    def chunk(self, num_rows: int, products: float) -> StepShape:
        """A prefill chunk, or several; `products` as in RoundLoad."""
        if num_rows == 0:
            return StepShape(0, 0.0, 0.0, 0)
        seen = float(self._seen(np.array([products / num_rows]))[0])
        return StepShape(num_rows, 0.0, num_rows * seen, 0)

    def draft_step(self, contexts: Floats, reads: float) -> StepShape:
        """In the target's K/V bytes, whoever drafts; `reads` as of draft_reads."""
        if reads < 1:
            return self.rows(np.minimum(contexts * reads, self._max_draft_budget))
        return self.rows(np.minimum(contexts, reads))

    def draft_reads(self, drafter: str, draft_budget: float) -> float:
        """Positions of each context that a draft step looks at, at most; below 1 a share of it."""
        if TRAITS[drafter].reads_view:
            return draft_budget
        return self._draft_model_reads if drafter == "draft_model" else math.inf

    def _seen(self, contexts: Floats) -> Floats:
        """Positions that a row of each sequence attends to, on the mean over the layers."""
        if len(self._windows) == 1 and self._windows[0][0] == math.inf:
            return contexts
        cut = [share * np.minimum(contexts, window) for window, share in self._windows]
        return np.asarray(np.sum(cut, axis=0))
