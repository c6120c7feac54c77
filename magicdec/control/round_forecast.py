"""What every choice for one round is expected to emit and to take."""

from dataclasses import dataclass

import numpy as np

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import Floats
from magicdec.control.round_costs import RoundCosts, RoundCostTable, RoundLoad
from magicdec.draft_choice import TRAITS


@dataclass(frozen=True, slots=True)
class Forecast:
    """All choices for one load.

    `tokens`, `seconds` and `rates` (tokens/s) are [num_settings, max_draft_length + 1]; column 0 is
    plain decoding, whatever the setting.
    """

    load: RoundLoad
    survival: Floats  # [num_rows, num_settings, max_draft_length] P(draft j is emitted)
    tokens: Floats
    seconds: Floats
    rates: Floats


class Forecaster:
    """Weighs the settings that differ: a drafter that reads no view has one."""

    def __init__(
        self, acceptance: AcceptanceModel, costs: RoundCosts, max_view_share: float
    ) -> None:
        axes = acceptance.axes
        served = axes.served_settings()  # indices into the acceptance model's
        self.settings = tuple(axes.name(setting) for setting in served)  # drafter, draft_budget
        self.costs = RoundCostTable(costs, self.settings, axes.max_draft_length)
        self._acceptance = acceptance
        self._served = None if len(served) == axes.num_settings else served
        self._max_view_share = max_view_share
        self._reads_view = np.array([TRAITS[drafter].reads_view for drafter, _ in self.settings])
        self._budgets = np.array([float(budget) for _, budget in self.settings])
        self._positions = np.arange(axes.max_draft_length)

    def forecast(self, load: RoundLoad) -> Forecast:
        seconds = self.costs.curves(load)
        survival = self._survival(load, hopeful=False)
        tokens = emitted_tokens(survival)
        return Forecast(load, survival, tokens, seconds, tokens / seconds)

    def hopeful_tokens(self, load: RoundLoad) -> Floats:
        """More than is expected, less than if every draft were accepted: Forecast.tokens' shape."""
        return emitted_tokens(self._survival(load, hopeful=True))

    def _survival(self, load: RoundLoad, *, hopeful: bool) -> Floats:
        """0 beyond what a row may draft, and over views that are too much of the context."""
        survival = self._acceptance.survival(
            load.context_lens, load.request_keys, hopeful=hopeful
        )  # [num_rows, num_settings, max_draft_length]
        if self._served is not None:
            survival = survival[:, self._served]
        contexts = np.array(load.context_lens, dtype=np.float64)[:, None]
        views = np.where(self._budgets < 1.0, self._budgets * contexts, self._budgets)
        views = np.minimum(views, contexts)
        too_wide = self._reads_view & (views > self._max_view_share * contexts)
        if too_wide.any():
            survival = survival * ~too_wide[:, :, None]
        if load.draft_limits:
            limits = np.array(load.draft_limits)[:, None, None]
            survival = survival * (self._positions < limits)
        return survival


def emitted_tokens(survival: Floats) -> Floats:
    """1 + sum_j P(draft j is emitted), summed over rows: [num_settings, max_draft_length + 1]."""
    num_rows, num_settings, num_positions = survival.shape
    tokens = np.full((num_settings, num_positions + 1), float(num_rows))
    np.cumsum(survival.sum(axis=0), axis=1, out=tokens[:, 1:])
    tokens[:, 1:] += num_rows
    return tokens
