"""Frozen, composed settings of one engine, resolved once before it is built."""

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")
MAX_DRAFT_LENGTH = 16  # kernels take up to 17 rows a sequence


class ConfigError(ValueError):
    """A setting out of its range; the message names field, value and limit."""


def check_at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


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
    kv_cache_bytes: int = 2 << 30  # a rank's share; the pool is as many whole blocks as fit
    num_blocks: int | None = None  # overrides kv_cache_bytes

    def __post_init__(self) -> None:
        check_at_least("block_size", self.block_size, 1)
        check_at_least("kv_cache_bytes", self.kv_cache_bytes, 1)
        if self.num_blocks is not None:
            check_at_least("num_blocks", self.num_blocks, 1)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much one step may hold."""

    max_num_seqs: int = 16  # sequences running at once
    max_batch_tokens: int = 512  # rows of one forward: decode rows with their drafts, then prefill

    def __post_init__(self) -> None:
        check_at_least("max_num_seqs", self.max_num_seqs, 1)
        check_at_least("max_batch_tokens", self.max_batch_tokens, self.max_num_seqs)


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """The draft: how many tokens a round, over how much of the KV cache."""

    draft_length: int = 4  # 0: plain decoding
    draft_budget: int = 512  # KV positions a draft step reads, a layer and KV head
    num_sink_tokens: int = 16  # of the budget: the first positions (StreamingLLM's sink)

    def __post_init__(self) -> None:
        check_at_least("draft_length", self.draft_length, 0)
        check_at_least("num_sink_tokens", self.num_sink_tokens, 0)
        if self.draft_length > MAX_DRAFT_LENGTH:
            raise ConfigError(
                f"draft_length must be at most {MAX_DRAFT_LENGTH}, got {self.draft_length}"
            )
        # The sink, the round's own tokens and at least one recent position.
        least = self.num_sink_tokens + self.draft_length + 1
        check_at_least("draft_budget", self.draft_budget, least)


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
