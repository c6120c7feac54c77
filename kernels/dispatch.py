"""Which attention runs: decided once by a capability probe, and said in the log."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from magicdec.kernels import paged_attention, reference, sparse_attention
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_attention import CpuAttention
from magicdec.kernels.paged_layout import PagedLayout

logger = logging.getLogger(__name__)


class PagedAttentionKernel(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        layout: PagedLayout,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """The two attentions of a round: over pages, and over the draft's gathered view."""

    name: str
    paged: PagedAttentionKernel
    gathered: Callable[..., torch.Tensor]


REFERENCE = AttentionBackend("reference", reference.paged_attention, reference.gathered_attention)
TORCH_FLASH_CPU = AttentionBackend(
    "torch-flash-cpu", paged_attention.paged_attention, sparse_attention.gathered_attention
)


def select_backend(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The fastest backend whose result on a small case agrees with the reference."""
    candidates = [*_compiled(), TORCH_FLASH_CPU] if device.type == "cpu" else []
    for backend in candidates:
        difference = _probe(backend, dtype)
        if difference < 0.05:
            logger.info("attention backend: %s", backend.name)
            return backend
        logger.warning("%s is off by %.3g on this machine", backend.name, difference)
    logger.warning("attention backend: reference on %s (slow, exact)", device)
    return REFERENCE


def _compiled() -> list[AttentionBackend]:
    """Empty where nothing can be compiled."""
    library = compiled_library()
    if library is None:
        return []
    attention = CpuAttention(library)
    return [AttentionBackend("compiled-cpu", attention.paged, attention.gathered)]


def _probe(backend: AttentionBackend, dtype: torch.dtype) -> float:
    """Largest difference from the reference: 3 rows over 600 keys, 2 KV heads of 3 queries each."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 3, 64, generator=generator).to(dtype)
    cache = torch.randn(2, 2, 640, 64, generator=generator).to(dtype)
    layout = PagedLayout((3,), (597,), (np.arange(10),), 64)
    try:
        out = backend.paged(query, cache[0], cache[1], layout, 0.125)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("%s cannot run here: %s", backend.name, error)
        return float("inf")
    expected = reference.paged_attention(query, cache[0], cache[1], layout, 0.125)
    return float((out.float() - expected.float()).abs().max())
