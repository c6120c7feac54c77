"""Which kernels run: decided once by a capability probe, and said in the log."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch

from magicdec.kernels import paged_attention, reference, selection, sparse_attention
from magicdec.kernels.attention_trials import chunk_seconds, difference_of
from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_attention import CpuAttention
from magicdec.kernels.cpu_attention_mass import CpuAttentionMass
from magicdec.kernels.cpu_gumbel import CpuGumbelArgmax
from magicdec.kernels.cpu_largest import CpuLargest
from magicdec.kernels.cpu_store import CpuStore
from magicdec.kernels.gumbel import GumbelArgmax, Winners, gumbel_argmax
from magicdec.kernels.kv_store import StoreKv, store_kv
from magicdec.kernels.paged_layout import DeviceLayout, PagedLayout
from magicdec.kernels.selection import LargestIndices, LayeredMass
from magicdec.kernels.sparse_attention import CopiedView, MakeDeviceView, MakeView
from magicdec.kernels.view_columns import ListColumns

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


class PagedOnDevice(Protocol):
    """A PagedAttentionKernel that reads nothing on the host: it may be part of a graph."""

    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        layout: DeviceLayout,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class ChooseOnDevice(Protocol):
    """gumbel.gumbel_argmax that reads nothing on the host: it may be part of a graph."""

    def __call__(
        self,
        scores: torch.Tensor,  # [num_rows, num_entries]
        keys: torch.Tensor,  # int64 [num_rows, 5], see gumbel.draw_keys
        first_entry: int = 0,
    ) -> Winners: ...


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """The attentions of a round, over pages and over the draft's view of them; and its mass, whose
    largest entries a view is chosen by. What is `on_device` serves graphs: all of it or none."""

    name: str
    paged: PagedAttentionKernel
    view: MakeView
    mass: LayeredMass = selection.layered_mass
    largest: LargestIndices = selection.largest_indices
    store: StoreKv = store_kv
    paged_on_device: PagedOnDevice | None = None
    view_on_device: MakeDeviceView | None = None
    columns_on_device: ListColumns | None = None
    choose_on_device: ChooseOnDevice | None = None


REFERENCE = AttentionBackend(
    "reference", reference.paged_attention, partial(CopiedView, reference.gathered_attention)
)
TORCH_FLASH_CPU = AttentionBackend(
    "torch-flash-cpu",
    paged_attention.paged_attention,
    partial(CopiedView, sparse_attention.gathered_attention),
)


def select_backend(
    device: torch.device, dtype: torch.dtype, block_size: int = 64
) -> AttentionBackend:
    """The fastest backend whose result on a small case agrees with the reference."""
    candidates = [*_compiled(), TORCH_FLASH_CPU] if device.type == "cpu" else []
    if has_triton(device):
        candidates = by_chunk_seconds(gpu_backends(block_size), device, dtype, block_size)
    for backend in candidates:
        difference = difference_of(backend.paged, device, dtype, block_size)
        if difference < 0.05:
            logger.info("attention backend: %s", backend.name)
            return backend
        logger.warning("%s is off by %.3g on this machine", backend.name, difference)
    logger.warning("attention backend: reference on %s (slow, exact)", device)
    return REFERENCE


def select_gumbel_argmax(device: torch.device) -> GumbelArgmax:
    """Which code chooses tokens; the choice is the same by either."""
    if has_triton(device):
        from magicdec.kernels import triton_gumbel

        return triton_gumbel.gumbel_argmax
    library = compiled_library() if device.type == "cpu" else None
    return gumbel_argmax if library is None else CpuGumbelArgmax(library)


def _compiled() -> list[AttentionBackend]:
    """Empty where nothing can be compiled."""
    library = compiled_library()
    if library is None:
        return []
    attention, largest = CpuAttention(library), CpuLargest(library)
    mass = partial(selection.layered_mass, mass=CpuAttentionMass(library))
    store = CpuStore(library)
    return [AttentionBackend("compiled-cpu", attention.paged, attention.view, mass, largest, store)]


def has_triton(device: torch.device) -> bool:
    """It comes with builds of torch for GPUs, so what imports it is imported where it is used."""
    return device.type == "cuda" and find_spec("triton") is not None


def triton_backend() -> AttentionBackend:
    """On a GPU; where kernels are interpreted, on a CPU too. Raises ImportError without triton."""
    from magicdec.kernels import (
        triton_attention,
        triton_gumbel,
        triton_largest,
        triton_mass,
        triton_rotary,
        triton_view,
        triton_view_columns,
    )

    return AttentionBackend(
        "triton",
        triton_attention.paged_attention,
        triton_view.make_view,
        triton_mass.attention_mass,
        triton_largest.largest_indices,
        store=triton_rotary.store_kv,
        paged_on_device=triton_attention.attend_on_device,
        view_on_device=triton_view.ListedView,
        columns_on_device=triton_view_columns.list_columns,
        choose_on_device=triton_gumbel.choose_on_device,
    )


def gpu_backends(block_size: int) -> list[AttentionBackend]:
    """Triton's, and with a prompt's chunks by each flash-attn that is installed."""
    from magicdec.kernels.flash_attention import installed_versions

    triton = triton_backend()
    others = [
        replace(triton, name=f"triton, {version.name}", paged=version.paged)
        for version in installed_versions(block_size)
    ]
    return [triton, *others]


def by_chunk_seconds(
    backends: list[AttentionBackend], device: torch.device, dtype: torch.dtype, block_size: int
) -> list[AttentionBackend]:
    """The fastest at a prompt's chunk first; nothing is timed where there is no choice."""
    if len(backends) < 2:
        return backends
    seconds = {each.name: chunk_seconds(each.paged, device, dtype, block_size) for each in backends}
    told = ", ".join(f"{name} {1e3 * taken:.3g}" for name, taken in seconds.items())
    logger.info("ms of a prompt's chunk: %s", told)
    return sorted(backends, key=lambda backend: seconds[backend.name])
