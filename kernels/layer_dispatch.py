"""Which kernels a layer's linears of few rows run in, and what stands between linears."""

import logging
from typing import Protocol

import torch

from magicdec.kernels.compiled import compiled_library
from magicdec.kernels.cpu_elementwise import CpuElementwise
from magicdec.kernels.dispatch import has_triton
from magicdec.kernels.head_norms import HeadNorms
from magicdec.kernels.linear_trials import difference_of_linears

logger = logging.getLogger(__name__)


class RotateAndStore(Protocol):
    def __call__(
        self,
        rows: torch.Tensor,  # [num_rows, heads of query, key and value]
        cos: torch.Tensor,  # [num_rows, head_dim]
        sin: torch.Tensor,
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,  # [num_rows], below 0: nowhere
        norms: HeadNorms | None = None,  # of query and key heads
    ) -> None:
        """rotate() and kv_store.store_kv bit for bit: query heads are turned in `rows`, key heads
        are turned in the pages alone."""
        ...


class Elementwise(Protocol):
    """What stands between linears, of tensors of one device and dtype."""

    device: torch.device
    dtype: torch.dtype

    def rms_norm(
        self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor: ...

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rotate(
        self,
        rows: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor: ...

    @property
    def rotate_and_store(self) -> RotateAndStore | None:
        """None: no kernel does both."""
        ...

    def silu_product(self, rows: torch.Tensor) -> torch.Tensor: ...


class FewRowLinears(Protocol):
    """Linears of a few rows, of tensors of one device and dtype, and what follows on them."""

    def fits(self, num_rows: int, weight: torch.Tensor) -> bool:
        """Whether there is a kernel for them."""
        ...

    def tile_rows(self, num_rows: int) -> int:
        """Equal for numbers of rows that the same kernel serves."""
        ...

    def linear(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def gated_linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor: ...


def select_elementwise(device: torch.device, dtype: torch.dtype) -> Elementwise | None:
    """None: nothing can be compiled here, or not for that dtype."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    if has_triton(device):
        from magicdec.kernels.triton_steps import TritonElementwise

        return TritonElementwise(device, dtype)
    library = compiled_library() if device.type == "cpu" else None
    return None if library is None else CpuElementwise(library, dtype)


def select_few_row_linears(device: torch.device, dtype: torch.dtype) -> FewRowLinears | None:
    """None: torch's serve, which a CPU's packed linears take the place of."""
    if not has_triton(device) or dtype not in (torch.bfloat16, torch.float16):
        return None
    from magicdec.kernels.triton_linear import TritonLinear

    linears = TritonLinear(device)
    difference = difference_of_linears(linears.linear, linears.gated_linear, device, dtype)
    if difference < 0.05:
        return linears
    logger.warning("linears of few rows are off by %.3g on this machine", difference)
    return None
