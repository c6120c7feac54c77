"""The settings of one engine, by section; defaults come from `magicdec/config.py`."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from magicdec.config import (
    DRAFTERS,
    MAX_DRAFT_LENGTH,
    CacheConfig,
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
_CACHE = CacheConfig()
_SCHEDULER = SchedulerConfig()
_SPECULATION = SpeculativeConfig()
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


class CacheSettings(Section):
    block_size: int = Field(default=_CACHE.block_size, description="Tokens a KV block.")
    kv_cache_gib: float = Field(
        default=_CACHE.kv_cache_bytes / GIB, gt=0, description="KV pool of one rank, in GiB."
    )
    num_blocks: int | None = Field(
        default=_CACHE.num_blocks,
        description="Size of the KV pool in blocks; overrides kv_cache_gib.",
    )
    prefix_caching: bool = Field(
        default=_CACHE.prefix_caching,
        description="Prompts that begin alike share the KV blocks of what they have in common.",
    )


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
    """SpeculativeConfig with its selection and its draft model, flat."""

    drafter: str = Field(
        default=_SPECULATION.drafter,
        description=f"Who drafts where a request names nobody: {', '.join(DRAFTERS)}.",
    )
    draft_length: int = Field(
        default=_SPECULATION.draft_length,
        description="Tokens drafted a round; 0 is plain decoding.",
    )
    draft_budget: Annotated[float, AfterValidator(_whole_or_share)] = Field(
        default=_SPECULATION.draft_budget,
        gt=0,
        description="KV positions that a draft step reads; below 1, a share of the context.",
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
        "Either comes out of kv_cache_gib.",
    )

    def config(self) -> SpeculativeConfig:
        """Raises ConfigError naming field, value and limit."""
        names = [field.name for field in fields(SelectionConfig)]
        window = self.draft_model_window
        return SpeculativeConfig(
            drafter=self.drafter,
            draft_length=self.draft_length,
            draft_budget=self.draft_budget,
            max_draft_length=self.max_draft_length,
            max_draft_budget=self.max_draft_budget,
            max_view_share=self.max_view_share,
            verification=self.verification,
            selection=SelectionConfig(**self.model_dump(include=set(names))),
            draft_model=DraftModelConfig(self.draft_model, window) if self.draft_model else None,
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
