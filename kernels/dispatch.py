"""Which kernels run: decided once by a capability probe, and said in the log."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from magicdec.kernels import paged_attention, reference, selection, sparse_attention
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_attention import CpuAttention
from magicdec.kernels.cpu_attention_mass import CpuAttentionMass
from magicdec.kernels.cpu_gumbel import CpuGumbelArgmax
from magicdec.kernels.cpu_largest import CpuLargest
from magicdec.kernels.gumbel import Draw, gumbel_argmax
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.selection import LargestIndices
from magicdec.kernels.sparse_attention import CopiedView, MakeView

logger = logging.getLogger(__name__)


class AttentionMass(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        layout: PagedLayout,
        sequence: int,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


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
    """The attentions of a round, over pages and over the draft's view of them; and its mass, whose
    largest entries a view is chosen by."""

    name: str
    paged: PagedAttentionKernel
    view: MakeView
    mass: AttentionMass = selection.attention_mass
    largest: LargestIndices = selection.largest_indices


REFERENCE = AttentionBackend(
    "reference", reference.paged_attention, partial(CopiedView, reference.gathered_attention)
)
TORCH_FLASH_CPU = AttentionBackend(
    "torch-flash-cpu",
    paged_attention.paged_attention,
    partial(CopiedView, sparse_attention.gathered_attention),
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


def select_gumbel_argmax(
    device: torch.device,
) -> Callable[[torch.Tensor, Sequence[Draw | None]], list[int]]:
    """Which code chooses tokens; the choice is the same by either."""
    library = compiled_library() if device.type == "cpu" else None
    return gumbel_argmax if library is None else CpuGumbelArgmax(library)


def _compiled() -> list[AttentionBackend]:
    """Empty where nothing can be compiled."""
    library = compiled_library()
    if library is None:
        return []
    attention, mass, largest = CpuAttention(library), CpuAttentionMass(library), CpuLargest(library)
    return [AttentionBackend("compiled-cpu", attention.paged, attention.view, mass, largest)]


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
