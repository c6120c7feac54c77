"""The KV pool's section of the settings."""

from pydantic import Field

from magicdec.config import CPU_KV_CACHE_BYTES, CacheConfig
from magicdec.deployments.engine_settings import GIB, Section

_CACHE = CacheConfig()


class CacheSettings(Section):
    block_size: int = Field(default=_CACHE.block_size, description="Tokens a KV block.")
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="KV pool of one rank, in GiB. Empty: what memory_share leaves beside the model "
        f"on a GPU, {CPU_KV_CACHE_BYTES / GIB:g} on a CPU.",
    )
    memory_share: float = Field(
        default=_CACHE.memory_share,
        gt=0,
        le=1,
        description="Of a GPU's memory, for the model, its largest step and the KV pool together; "
        "sizes the pool while kv_cache_gib and num_blocks are empty.",
    )
    num_blocks: int | None = Field(
        default=_CACHE.num_blocks,
        description="Size of the KV pool in blocks; overrides kv_cache_gib.",
    )
    prefix_caching: bool = Field(
        default=_CACHE.prefix_caching,
        description="Prompts that begin alike share the KV blocks of what they have in common.",
    )

    @property
    def kv_cache_bytes(self) -> int | None:
        return None if self.kv_cache_gib is None else int(self.kv_cache_gib * GIB)
