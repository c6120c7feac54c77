"""The time of plain steps and of rounds by the roofline, and what drafts best (Eq. 1-4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from magicdec.config import SpeculativeConfig
from magicdec.cost_model import StepShape, best_draft_length, expected_tokens
from magicdec.draft_choice import TRAITS
from magicdec.planning.acceptance import default_acceptance
from magicdec.planning.devices import PlanDevice
from magicdec.planning.figures import DraftFigures, StepShares
from magicdec.planning.memory import PlanModel
from magicdec.roofline import ModelGeometry, roofline_cost

_PAGED = 2  # a view is read from the pages and written to its copy, once a round
_KEYS_ALONE = 0.5  # of K/V, and of attention's arithmetic: what an observation looks at


@dataclass(frozen=True, slots=True)
class DraftSetting:
    """Who may draft, over how much. `acceptance` None: what is expected by default."""

    drafter: str
    draft_budget: int
    acceptance: float | None = None

    def accepts(self, context_len: float) -> float:
        if self.acceptance is not None:
            return self.acceptance
        return default_acceptance(self.drafter, self.draft_budget, context_len)


class RoundPlanner:
    """Steps and rounds of a batch whose sequences are of one length."""

    def __init__(
        self,
        model: PlanModel,
        device: PlanDevice,
        num_ranks: int,
        max_draft_length: int,
        limits: SpeculativeConfig,
        draft_model: PlanModel | None = None,
    ) -> None:
        """Raises ValueError for a degree below 1 or above the number of query heads."""
        self._geometry = model.geometry
        rates = device.rates(self._geometry.num_layers, num_ranks)
        self._cost = roofline_cost(self._geometry, rates, num_ranks)
        self._max_draft_length = max_draft_length
        self._limits = limits
        self._draft_geometry = draft_model.geometry if draft_model is not None else None
        if self._draft_geometry is not None:  # whole on every rank: nothing is reduced
            own = device.rates(self._draft_geometry.num_layers, 1)
            self._draft_cost = roofline_cost(self._draft_geometry, own)

    def forward_seconds(self, batch_size: int, context_len: int, num_rows: int = 1) -> float:
        """One pass of so many rows a sequence; of one row, a plain step."""
        return self._cost.seconds(self._shape(batch_size, context_len, num_rows))

    def shares(self, batch_size: int, context_len: int) -> StepShares:
        cost, shape = self._cost, self._shape(batch_size, context_len, 1)
        linears = cost.per_row * shape.num_rows
        reads = cost.weights >= linears
        kv = cost.per_kv_byte * shape.kv_bytes
        compute = cost.per_row_product * shape.row_products + (0.0 if reads else linears)
        weights = cost.weights if reads else 0.0
        total = weights + kv + compute + cost.fixed
        return StepShares(weights / total, kv / total, compute / total, cost.fixed / total)

    def draft_seconds(self, setting: DraftSetting, batch_size: int, context_len: int) -> float:
        """One draft step."""
        if setting.drafter == "ngram":
            return 0.0
        seen = min(setting.draft_budget, context_len)
        if setting.drafter == "draft_model":
            if self._draft_geometry is None:
                raise ValueError("drafter draft_model needs the geometry of a draft model")
            return self._draft_cost.seconds(_batch_shape(self._draft_geometry, batch_size, seen, 1))
        return self._cost.seconds(self._shape(batch_size, seen, 1))

    def best_draft(
        self, batch_size: int, context_len: int, settings: Sequence[DraftSetting]
    ) -> DraftFigures:
        """The drafter, budget and length of the most tokens a second; the first of equals."""
        plain = self.forward_seconds(batch_size, context_len)
        best = DraftFigures(0, batch_size / plain)
        for setting in settings:
            found = self._draft(setting, batch_size, context_len)
            if found is not None and found.tokens_per_second > best.tokens_per_second:
                best = found
        return best

    def may_draft(self, setting: DraftSetting, context_len: float) -> bool:
        """The engine drafts nothing where the view would be too much of the context to pay."""
        share = self._limits.max_view_share
        return not TRAITS[setting.drafter].reads_view or (
            min(setting.draft_budget, context_len) <= share * context_len
        )

    def _draft(
        self, setting: DraftSetting, batch_size: int, context_len: int
    ) -> DraftFigures | None:
        """None where nothing is drafted, or drafting does not pay."""
        if not self.may_draft(setting, context_len):
            return None
        acceptance = setting.accepts(context_len)
        step = self.draft_seconds(setting, batch_size, context_len)
        begin = self._begin_seconds(setting, batch_size, context_len)
        verify = [
            self.forward_seconds(batch_size, context_len, n + 1)
            + (begin + self._observe_seconds(setting, batch_size, context_len, n + 1) if n else 0.0)
            for n in range(self._max_draft_length + 1)
        ]
        length = best_draft_length(acceptance, step, verify)
        if length == 0:
            return None
        tokens = batch_size * expected_tokens(acceptance, length)
        reads_view = TRAITS[setting.drafter].reads_view
        return DraftFigures(
            draft_length=length,
            tokens_per_second=tokens / (length * step + verify[length]),
            drafter=setting.drafter,
            draft_budget=setting.draft_budget if reads_view else None,
            acceptance=acceptance,
        )

    def _shape(self, batch_size: int, context_len: int, num_rows: int) -> StepShape:
        return _batch_shape(self._geometry, batch_size, context_len, num_rows)

    def _begin_seconds(self, setting: DraftSetting, batch_size: int, context_len: int) -> float:
        """Once a round: the view is copied."""
        if not TRAITS[setting.drafter].reads_view:
            return 0.0
        view = self._shape(batch_size, min(setting.draft_budget, context_len), 1)
        return _PAGED * self._cost.per_kv_byte * view.kv_bytes

    def _observe_seconds(
        self, setting: DraftSetting, batch_size: int, context_len: int, num_rows: int
    ) -> float:
        """`recycled` weighs every key by a round's rows, once in refresh_rounds; the mean."""
        if setting.drafter != "recycled":
            return 0.0
        shape = self._shape(batch_size, context_len, num_rows)
        looking = replace(self._cost, fixed=0.0, weights=0.0, per_row=0.0, per_sequence=0.0)
        return _KEYS_ALONE * looking.seconds(shape) / self._limits.selection.refresh_rounds


def _batch_shape(
    geometry: ModelGeometry, batch_size: int, context_len: int, num_rows: int
) -> StepShape:
    """Of sequences alike."""
    one = geometry.step_shape([num_rows], [context_len])
    return StepShape(
        batch_size * one.num_rows,
        batch_size * one.kv_bytes,
        batch_size * one.row_products,
        batch_size,
    )
