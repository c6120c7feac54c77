"""The plan of one model on one kind of device: rates, where the time goes, and where that turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from magicdec.config import (
    DRAFTERS,
    MAX_DRAFT_LENGTH,
    ConfigError,
    DraftModelConfig,
    SpeculativeConfig,
    check_at_least,
    check_at_most,
)
from magicdec.draft_choice import TRAITS
from magicdec.planning.devices import PlanDevice
from magicdec.planning.figures import PointFigures
from magicdec.planning.memory import MemoryPlan, PlanModel, fullest_share
from magicdec.planning.rounds import DraftSetting, RoundPlanner
from magicdec.roofline import critical_context

_PADDING = 0.01  # of a vocabulary, in its logits
_SETTLING = 12  # repetitions after which acceptance and critical length agree


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked of a plan. Raises ConfigError naming field, value and limit."""

    model: PlanModel
    device: PlanDevice
    batch_sizes: tuple[int, ...]
    context_lens: tuple[int, ...]
    settings: tuple[DraftSetting, ...]
    num_ranks: int = 1
    max_draft_length: int = MAX_DRAFT_LENGTH
    draft_model: PlanModel | None = None
    limits: SpeculativeConfig = field(default_factory=SpeculativeConfig)  # of the view

    def __post_init__(self) -> None:
        self._check_ranks()
        for name, values in (("batch", self.batch_sizes), ("context", self.context_lens)):
            if not values:
                raise ConfigError(f"{name} must name at least one number")
            for value in values:
                check_at_least(name, value, 1)
        if self.model.max_context is not None:
            for context_len in self.context_lens:
                name = "context (the model's max_position_embeddings)"
                check_at_most(name, context_len, self.model.max_context)
        check_at_least("max_draft_length", self.max_draft_length, 0)
        check_at_most("max_draft_length", self.max_draft_length, MAX_DRAFT_LENGTH)
        for setting in self.settings:
            self._check_setting(setting)
        if self.draft_model is not None:
            self._check_draft_model(self.draft_model)

    def _check_ranks(self) -> None:
        """More ranks than query heads cannot be; an uneven split can, and is served."""
        num_heads = self.model.geometry.num_query_heads
        if not 1 <= self.num_ranks <= num_heads:
            even = ", ".join(str(n) for n in self.model.even_degrees)
            raise ConfigError(
                f"tensor_parallel_size must be between 1 and {num_heads} (the query heads), got "
                f"{self.num_ranks}; {even} split the {self.model.geometry.num_kv_heads} KV heads "
                "evenly"
            )

    def _check_setting(self, setting: DraftSetting) -> None:
        if setting.drafter == "draft_model" and self.draft_model is None:
            raise ConfigError("drafter draft_model needs draft_model: a folder or config.json")
        if setting.acceptance is not None and not 0.0 <= setting.acceptance <= 1.0:
            raise ConfigError(f"acceptance must be between 0 and 1, got {setting.acceptance}")
        if TRAITS[setting.drafter].reads_view:
            least = self.limits.least_draft_budget(self.max_draft_length)
            check_at_least("budget", setting.draft_budget, least)

    def _check_draft_model(self, draft: PlanModel) -> None:
        """What sizes can tell: the engine compares every token, and logits may be padded."""
        own, other = self.model.geometry.vocab_size, draft.geometry.vocab_size
        if abs(own - other) > _PADDING * own:
            raise ConfigError(
                f"draft_model must have the model's vocabulary of {own:,} tokens, got {other:,}"
            )
        if draft.max_context is not None:
            name = "context (the draft model's max_position_embeddings)"
            check_at_most(name, max(self.context_lens), draft.max_context)


@dataclass(frozen=True, slots=True)
class CriticalLength:
    """The context from which a draft gains, and gains more, as the batch grows without end."""

    context_len: float
    setting: DraftSetting
    draft_length: int


class Plan:
    """Answers of the roofline to one request."""

    def __init__(self, request: PlanRequest) -> None:
        """Raises ConfigError, saying what would fit, where not even the smallest batch does."""
        self.request = request
        window = DraftModelConfig(path="").window or 0
        self.memory = MemoryPlan(
            request.model, request.device, request.num_ranks, request.draft_model, window
        )
        self.memory.check(request.batch_sizes, request.context_lens)
        self.rounds = RoundPlanner(
            request.model,
            request.device,
            request.num_ranks,
            request.max_draft_length,
            request.limits,
            request.draft_model,
        )

    def points(self) -> list[PointFigures]:
        """Batch by batch, contexts in the order asked for."""
        request = self.request
        return [self.point(b, c) for b in request.batch_sizes for c in request.context_lens]

    def point(self, batch_size: int, context_len: int) -> PointFigures:
        share = self.memory.kv_bytes(batch_size, context_len) / self.memory.kv_pool_bytes
        if share > 1.0:
            return PointFigures(batch_size, context_len, kv_share=share)
        return PointFigures(
            batch_size,
            context_len,
            kv_share=share,
            plain_tokens_per_second=batch_size
            / self.rounds.forward_seconds(batch_size, context_len),
            draft=self.rounds.best_draft(batch_size, context_len, self.request.settings),
            shares=self.rounds.shares(batch_size, context_len),
        )

    def kv_overtakes(self, batch_size: int) -> float:
        """The context from which a plain step reads more K/V than weights; infinite if never.

        Of the rank with the most heads: with an even split, context_where_kv_overtakes.
        """
        geometry, ranks = self.request.model.geometry, self.request.num_ranks
        share = fullest_share(geometry, ranks)
        return geometry.context_reading(geometry.weight_bytes / (batch_size * share * ranks))

    def critical(self) -> CriticalLength | None:
        """The shortest over settings and draft lengths; None where no view is read."""
        found = [
            CriticalLength(self._critical_context(setting, length), setting, length)
            for setting in self.request.settings
            if TRAITS[setting.drafter].reads_view
            for length in range(1, self.request.max_draft_length + 1)
        ]
        return min(found, key=lambda critical: critical.context_len, default=None)

    def _critical_context(self, setting: DraftSetting, draft_length: int) -> float:
        """At the acceptance of that very context, which falls a little as contexts grow."""
        request = self.request
        geometry = request.model.geometry
        rates = request.device.rates(geometry.num_layers, request.num_ranks)
        context = 8192.0
        for _ in range(_SETTLING):
            context = critical_context(
                geometry,
                rates,
                acceptance=setting.accepts(min(context, 1e9)),
                draft_length=draft_length,
                draft_budget=setting.draft_budget,
            )
        return context


def draft_settings(
    drafters: Sequence[str], budgets: Sequence[int], acceptances: Sequence[float]
) -> tuple[DraftSetting, ...]:
    """Every drafter over every budget; one that reads no view once.

    Without acceptances those expected by default; one counts for all, several for the budgets in
    turn. Raises ConfigError for an unknown drafter and for another number of acceptances.
    """
    unknown = [name for name in drafters if name not in DRAFTERS]
    if unknown or not drafters:
        names = ", ".join(DRAFTERS)
        raise ConfigError(f"drafter must be one of {names}, got {unknown[0] if unknown else ''!r}")
    if len(acceptances) not in (0, 1, len(budgets)):
        raise ConfigError(
            f"acceptance must be one number or one a budget ({len(budgets)}), "
            f"got {len(acceptances)}"
        )
    given: Sequence[float | None] = acceptances or [None]
    by_budget = given if len(given) == len(budgets) else [given[0]] * len(budgets)
    window = DraftModelConfig(path="").window or 0
    settings = []
    for drafter in drafters:
        if TRAITS[drafter].reads_view:
            for budget, acceptance in zip(budgets, by_budget, strict=True):
                settings.append(DraftSetting(drafter, budget, acceptance))
        else:
            settings.append(DraftSetting(drafter, window, by_budget[0]))
    return tuple(settings)
