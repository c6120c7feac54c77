"""The settings of one engine, by section; defaults come from `magicdec/config.py`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from magicdec.config import (
    DRAFTERS,
    MAX_DRAFT_LENGTH,
    AdaptiveConfig,
    ConfigError,
    DraftModelConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME

GIB = 1 << 30
_MODEL = ModelConfig(path=EMBEDDED_MODEL_NAME)
_SCHEDULER = SchedulerConfig()
_SPECULATION = SpeculativeConfig()
_ADAPTIVE = AdaptiveConfig()
_SELECTION = SelectionConfig()
_DRAFT_MODEL = DraftModelConfig(path="")
_PARALLEL = ParallelConfig()


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSettings(Section):
    path: str = Field(
        default=_MODEL.path,
        description="Hugging Face folder, hub id, or the name of the embedded model.",
    )
    dtype: str = Field(
        default=_MODEL.dtype,
        description="float32 (exact), bfloat16 or float16, of the KV cache and, where the CPU or "
        "GPU has its arithmetic, of the model.",
    )
    max_model_len: int | None = Field(
        default=_MODEL.max_model_len,
        description="Longest context in tokens, prompt and output; empty: what the model declares.",
    )
    served_name: str | None = Field(
        default=None, description="The name clients use; empty: the last part of path."
    )

    @property
    def name(self) -> str:
        """What /v1/models lists and requests must name."""
        return self.served_name or Path(self.path).name


class SchedulerSettings(Section):
    max_num_seqs: int = Field(
        default=_SCHEDULER.max_num_seqs, description="Sequences that one replica runs at once."
    )
    max_batch_tokens: int = Field(
        default=_SCHEDULER.max_batch_tokens,
        description="Tokens of one step: decode rows with their drafts, then prefill chunks.",
    )


def _whole_or_share(budget: float) -> float:
    """512.0 is 512 positions; what is out of range is left to the engine's config to refuse."""
    return int(budget) if budget >= 1 and budget == int(budget) else budget


class SpeculationSettings(Section):
    """SpeculativeConfig with its selection, its draft model and what is adaptive, flat."""

    drafter: str | None = Field(
        default=None,
        description=f"Who drafts where a request names nobody: {', '.join(DRAFTERS)}. Empty: each "
        f"round has one of drafters ({_SPECULATION.drafter} where draft_length is set).",
    )
    draft_length: int | None = Field(
        default=None,
        description="Tokens drafted in every round; 0 is plain decoding. Empty: each round has the "
        "length that is predicted to be fastest, which may be 0.",
    )
    draft_budget: Annotated[float, AfterValidator(_whole_or_share)] | None = Field(
        default=None,
        gt=0,
        description="KV positions that a draft step reads; below 1, a share of the context. Empty: "
        "each round has one of draft_budgets "
        f"({_SPECULATION.draft_budget:g} where draft_length is set).",
    )
    drafters: tuple[str, ...] | None = Field(
        default=None,
        description="Among whom each round may choose while draft_length is empty; empty: "
        f"{' and '.join(_ADAPTIVE.drafters)}, and draft_model where there is one.",
    )
    draft_budgets: tuple[Annotated[float, AfterValidator(_whole_or_share)], ...] | None = Field(
        default=None,
        description="Among which budgets, ascending; empty: "
        f"{', '.join(format(b, 'g') for b in _ADAPTIVE.draft_budgets)}, those within "
        "max_draft_budget.",
    )
    exploration_share: float = Field(
        default=_ADAPTIVE.exploration_share,
        description="Of the time, that may be lost by trying other drafts; 0: none are tried.",
    )
    inter_token_target_s: float = Field(
        default=_ADAPTIVE.inter_token_target_s,
        description="While answers are written, prompts are computed in steps that end after about "
        "so many seconds; only while draft_length is empty.",
    )
    max_draft_length: int = Field(
        default=_SPECULATION.max_draft_length,
        ge=0,
        description="The most tokens a round that a request may ask for; "
        f"{MAX_DRAFT_LENGTH} at most.",
    )
    max_draft_budget: int = Field(
        default=_SPECULATION.max_draft_budget,
        ge=1,
        description="The most KV positions that a request may ask for; a share ends there too.",
    )
    max_view_share: float = Field(
        default=_SPECULATION.max_view_share,
        description="Nothing is drafted while the positions to be read are more than this share of "
        "the context: such a draft costs more than it gains.",
    )
    verification: str = Field(
        default=_SPECULATION.verification,
        description="shared_gumbel or optimal_coupling. optimal_coupling accepts more drafts and "
        "samples the same distribution, but its tokens depend on the drafts: it gives up seed "
        "replay and the token-equal resume of a broken stream.",
    )
    num_sink_tokens: int = Field(
        default=_SELECTION.num_sink_tokens,
        description="Of the budget: the first positions of the context, always read.",
    )
    num_recent_tokens: int = Field(
        default=_SELECTION.num_recent_tokens,
        description="Of the budget: at least so many of the last positions, always read.",
    )
    num_first_layers: int = Field(
        default=_SELECTION.num_first_layers,
        description="Layers, from the first, that read first_layers_factor times the budget.",
    )
    first_layers_factor: float = Field(
        default=_SELECTION.first_layers_factor,
        description="How many times the budget the first layers read.",
    )
    refresh_rounds: int = Field(
        default=_SELECTION.refresh_rounds,
        description="recycled: verify passes from one selection to the next.",
    )
    chunk_size: int = Field(
        default=_SELECTION.chunk_size,
        description="recycled: neighbouring positions that are chosen together; 1 is each alone.",
    )
    coverage: float = Field(
        default=_SELECTION.coverage,
        description="recycled: the share of the attention at which the selection ends; 1 always "
        "fills the budget.",
    )
    draft_model: str | None = Field(
        default=None,
        description="draft_model: Hugging Face folder or hub id of a smaller model with the same "
        "vocabulary, loaded beside the model; empty: none.",
    )
    draft_model_window: int | None = Field(
        default=_DRAFT_MODEL.window,
        description="draft_model: KV positions that it keeps of each sequence; empty: all of them. "
        "Either comes out of the KV pool.",
    )

    def config(self) -> SpeculativeConfig:
        """Raises ConfigError naming field, value and limit."""
        for name in ("drafters", "draft_budgets"):
            if self.draft_length is not None and name in self.model_fields_set:
                raise ConfigError(
                    f"{name} is what rounds choose among: draft_length must be empty, "
                    f"got {self.draft_length}"
                )
        names = [field.name for field in fields(SelectionConfig)]
        window, length = self.draft_model_window, self.draft_length
        fixed = SpeculativeConfig(
            drafter=self.drafter or _SPECULATION.drafter,
            draft_length=self._draft_length(),
            draft_budget=self.draft_budget or min(_SPECULATION.draft_budget, self.max_draft_budget),
            max_draft_length=self.max_draft_length,
            max_draft_budget=self.max_draft_budget,
            max_view_share=self.max_view_share,
            verification=self.verification,
            selection=SelectionConfig(**self.model_dump(include=set(names))),
            draft_model=DraftModelConfig(self.draft_model, window) if self.draft_model else None,
        )
        return replace(fixed, adaptive=self._adaptive()) if length is None else fixed

    def _draft_length(self) -> int:
        if self.draft_length is None:
            return min(_SPECULATION.draft_length, self.max_draft_length)
        return self.draft_length

    def _adaptive(self) -> AdaptiveConfig:
        """A drafter or a budget that is set leaves the round no choice of it."""
        drafters, budgets = self.drafters, self.draft_budgets
        if drafters is None:
            drafters = _ADAPTIVE.drafters + (("draft_model",) if self.draft_model else ())
        if budgets is None:
            within = tuple(b for b in _ADAPTIVE.draft_budgets if b <= self.max_draft_budget)
            budgets = within or (self.max_draft_budget,)
        return AdaptiveConfig(
            drafters=(self.drafter,) if self.drafter else drafters,
            draft_budgets=(self.draft_budget,) if self.draft_budget else budgets,
            exploration_share=self.exploration_share,
            inter_token_target_s=self.inter_token_target_s,
        )


class ParallelSettings(Section):
    tensor_parallel_size: int = Field(
        default=_PARALLEL.tensor_parallel_size, description="Ranks that one replica is split over."
    )
    num_threads: int | None = Field(
        default=_PARALLEL.num_threads,
        description="torch threads a rank; empty: the cores are shared among the ranks.",
    )
    use_gpu: bool = Field(
        default=False, description="Give each rank one GPU; otherwise ranks run on CPUs."
    )
