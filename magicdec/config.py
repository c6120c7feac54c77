"""Frozen, composed settings of one engine, resolved once before it is built."""

from dataclasses import dataclass, field
from itertools import pairwise

DTYPES = ("float32", "bfloat16", "float16")
MAX_DRAFT_LENGTH = 16  # kernels take up to 17 rows a sequence
OBSERVATION_WINDOW = 32  # last rows of a prompt, whose attention seeds SnapKV's selection
DRAFTERS = ("streaming", "snapkv", "recycled", "draft_model", "ngram")
VERIFICATION_RULES = ("shared_gumbel", "optimal_coupling")
MEMORY_SHARE = 0.9  # of a GPU's memory; the rest is for what no start-up can see
CPU_KV_CACHE_BYTES = 2 << 30  # of a rank that shares the host's memory


class ConfigError(ValueError):
    """A setting out of its range; the message names field, value and limit."""


def check_at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def check_at_most(name: str, value: float, high: float) -> None:
    if not value <= high:
        raise ConfigError(f"{name} must be at most {high}, got {value}")


def check_share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {value}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights, and how long a context they serve."""

    path: str  # a Hugging Face folder or hub id
    dtype: str = "bfloat16"
    max_model_len: int | None = None  # tokens, prompt and output; None: what the model declares

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.max_model_len is not None:
            check_at_least("max_model_len", self.max_model_len, 2)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV pool of one rank."""

    block_size: int = 64  # tokens a block; flash-attn needs a multiple of 256
    # A rank's share, of which the pool is as many whole blocks as fit. None: what memory_share
    # leaves beside the model on a GPU, CPU_KV_CACHE_BYTES on a CPU.
    kv_cache_bytes: int | None = None
    memory_share: float = MEMORY_SHARE  # of a GPU's memory, for the model and the pool together
    num_blocks: int | None = None  # overrides kv_cache_bytes
    prefix_caching: bool = True  # prompts that begin alike share the blocks of their prefix

    def __post_init__(self) -> None:
        check_at_least("block_size", self.block_size, 1)
        if self.kv_cache_bytes is not None:
            check_at_least("kv_cache_bytes", self.kv_cache_bytes, 1)
        check_share("memory_share", self.memory_share)
        if self.num_blocks is not None:
            check_at_least("num_blocks", self.num_blocks, 1)

    @property
    def pool_bytes(self) -> int:
        """What is set, or a CPU's default: a GPU's rank sets what it has found to be free."""
        return CPU_KV_CACHE_BYTES if self.kv_cache_bytes is None else self.kv_cache_bytes


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much one step may hold."""

    max_num_seqs: int = 16  # sequences running at once
    max_batch_tokens: int = 512  # rows of one forward: decode rows with their drafts, then prefill

    def __post_init__(self) -> None:
        check_at_least("max_num_seqs", self.max_num_seqs, 1)
        # A row for every sequence, and a whole observation window for a prompt's last chunk.
        least = self.max_num_seqs + OBSERVATION_WINDOW
        check_at_least("max_batch_tokens", self.max_batch_tokens, least)


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """Which KV positions a draft over the target's own cache reads, of its budget."""

    num_sink_tokens: int = 16  # the first positions of the context, always read
    num_recent_tokens: int = 64  # at least so many of the last ones, always read
    num_first_layers: int = 0  # layers that read first_layers_factor times the budget
    first_layers_factor: float = 2.0
    refresh_rounds: int = 16  # `recycled`: a new selection every so many verify passes
    chunk_size: int = 1  # `recycled`: positions chosen together
    coverage: float = 1.0  # `recycled`: stop at this share of the attention mass; 1: whole budget

    def __post_init__(self) -> None:
        check_at_least("num_sink_tokens", self.num_sink_tokens, 0)
        check_at_least("num_recent_tokens", self.num_recent_tokens, 1)
        check_at_least("num_first_layers", self.num_first_layers, 0)
        check_at_least("first_layers_factor", self.first_layers_factor, 1)
        check_at_least("refresh_rounds", self.refresh_rounds, 1)
        check_at_least("chunk_size", self.chunk_size, 1)
        check_share("coverage", self.coverage)


@dataclass(frozen=True, slots=True)
class DraftModelConfig:
    """A smaller model of the same vocabulary that drafts in the rank's process."""

    path: str  # a Hugging Face folder or hub id
    window: int | None = 512  # KV positions it keeps a sequence; None: all, in pages of its own

    def __post_init__(self) -> None:
        if self.window is not None:
            check_at_least("draft_model_window", self.window, 1)


@dataclass(frozen=True, slots=True)
class AdaptiveConfig:
    """What each round may choose among, and how reluctantly (draft_length.py)."""

    drafters: tuple[str, ...] = ("recycled", "ngram")
    draft_budgets: tuple[float, ...] = (256, 512, 1024)  # ascending; not for those without a view
    exploration_share: float = 0.01  # of the time, that may be lost by trying; 0: never try
    inter_token_target_s: float = 1.0  # prefill beside decode rows ends a step about there

    def __post_init__(self) -> None:
        unknown = [name for name in self.drafters if name not in DRAFTERS]
        if unknown or not self.drafters or len(set(self.drafters)) < len(self.drafters):
            names = ", ".join(DRAFTERS)
            raise ConfigError(f"drafters must be of {names}, once each, got {self.drafters}")
        budgets = self.draft_budgets
        if not budgets or not all(a < b for a, b in pairwise((0, *budgets))):
            raise ConfigError(f"draft_budgets must be above 0 and ascend, got {budgets}")
        check_at_least("exploration_share", self.exploration_share, 0)
        check_at_most("exploration_share", self.exploration_share, 1)
        if not self.inter_token_target_s > 0:
            raise ConfigError(
                f"inter_token_target_s must be above 0, got {self.inter_token_target_s}"
            )


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """The draft: by whom, how many tokens a round, over how much of the KV cache.

    `optimal_coupling` accepts with probability min(1, p/q) and resamples the residual: two or
    three points more acceptance, and the distribution stays the target's. But the tokens then
    depend on draft length and budget, so it gives up seed replay and the token-equal resume of a
    stream whose replica died; `shared_gumbel` keeps both.
    """

    drafter: str = "recycled"
    draft_length: int = 4  # 0: plain decoding
    draft_budget: float = 512  # KV positions a draft step reads; below 1: a share of the context
    max_draft_length: int = MAX_DRAFT_LENGTH  # the most that a request may ask for
    max_draft_budget: int = 4096  # the same, and the cap of a share
    max_view_share: float = 1 / 3  # no draft where its view would be more of the context
    verification: str = "shared_gumbel"
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    draft_model: DraftModelConfig | None = None
    adaptive: AdaptiveConfig | None = None  # None: every round is as drafter, length, budget say

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}, got {self.drafter!r}")
        if self.drafter == "draft_model" and self.draft_model is None:
            raise ConfigError("drafter draft_model needs the path of a draft model")
        if self.verification not in VERIFICATION_RULES:
            rules = ", ".join(VERIFICATION_RULES)
            raise ConfigError(f"verification must be one of {rules}, got {self.verification!r}")
        check_at_least("draft_length", self.draft_length, 0)
        check_at_most("max_draft_length", self.max_draft_length, MAX_DRAFT_LENGTH)
        check_at_most("draft_length", self.draft_length, self.max_draft_length)
        check_share("max_view_share", self.max_view_share)
        check_at_most("draft_budget", self.draft_budget, self.max_draft_budget)
        self._check_draft_budget()
        if self.draft_model is not None and self.draft_model.window is not None:
            least = self.least_draft_budget(self.max_draft_length)
            check_at_least("draft_model_window", self.draft_model.window, least)
        if self.adaptive is not None:
            self._check_adaptive(self.adaptive)

    def _check_adaptive(self, adaptive: AdaptiveConfig) -> None:
        if "draft_model" in adaptive.drafters and self.draft_model is None:
            raise ConfigError("drafters draft_model needs the path of a draft model")
        check_at_least("max_draft_length", self.max_draft_length, 1)
        whole = [budget for budget in adaptive.draft_budgets if budget >= 1]
        if whole:
            least = self.least_draft_budget(self.max_draft_length)
            check_at_least("draft_budgets", whole[0], least)
            check_at_most("draft_budgets", whole[-1], self.max_draft_budget)

    def _check_draft_budget(self) -> None:
        if self.draft_budget < 1:
            check_share("draft_budget", self.draft_budget)
            return
        if self.draft_budget != int(self.draft_budget):
            raise ConfigError(
                "draft_budget must be whole, or a share of the context below 1, "
                f"got {self.draft_budget}"
            )
        least = self.least_draft_budget(self.draft_length)
        check_at_least("draft_budget", self.draft_budget, least)

    @property
    def selection_budget(self) -> int:
        """KV positions that a selection is made for at least: rounds may change their budget."""
        budgets = () if self.adaptive is None else self.adaptive.draft_budgets
        return int(max((budget for budget in budgets if budget >= 1), default=0))

    def least_draft_budget(self, draft_length: int) -> int:
        """The sink, the recent positions and the round's own tokens."""
        return self.selection.num_sink_tokens + self.selection.num_recent_tokens + draft_length


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    tensor_parallel_size: int = 1
    num_threads: int | None = None  # torch threads a rank; None: the cores, shared

    def __post_init__(self) -> None:
        check_at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.num_threads is not None:
            check_at_least("num_threads", self.num_threads, 1)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
