"""Chunks go to flash-attn as its documentation asks, whatever the version; few rows do not.

flash-attn runs on GPUs alone: here an oracle stands for it that holds it to what it documents.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from magicdec.kernels import dispatch, reference
from magicdec.kernels.flash_attention import ChunkAttention, installed_versions
from magicdec.kernels.paged_layout import PagedLayout
from tests.kernels.layouts import make_layout

CONTEXT_LENS, QUERY_LENS = [70, 300, 0, 1], [1, 40, 100, 5]
VERSIONS = [("flash_attn", "block_table", 256), ("flash_attn_interface", "page_table", 1)]


class Documented:
    """flash_attn_with_kvcache, by the reference."""

    def __init__(self, table_name: str, block_multiple: int) -> None:
        self.table_name, self.block_multiple = table_name, block_multiple
        self.chunks: list[tuple[int, int]] = []  # rows, keys

    def __call__(
        self,
        q: torch.Tensor,  # [batch, num_rows, num_query_heads, head_dim]
        k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        num_splits: int,
        **tables: torch.Tensor,
    ) -> torch.Tensor:
        ((name, table),) = tables.items()
        block_size = k_cache.shape[1]
        assert name == self.table_name
        assert block_size % self.block_multiple == 0
        assert q.dtype == k_cache.dtype == v_cache.dtype in (torch.float16, torch.bfloat16)
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert cache_seqlens.dtype == table.dtype == torch.int32
        assert table.is_contiguous()
        assert causal
        assert num_splits == 1
        (num_rows, num_keys) = q.shape[1], int(cache_seqlens[0])
        self.chunks.append((num_rows, num_keys))
        needed = -(-num_keys // block_size)
        blocks = (table[0, :needed].long().cpu().numpy(),)
        layout = PagedLayout((num_rows,), (num_keys - num_rows,), blocks, block_size)
        keys, values = (cache.permute(2, 0, 1, 3).flatten(1, 2) for cache in (k_cache, v_cache))
        left, right = window_size
        assert (left < 0) == (right < 0)
        out = reference.paged_attention(
            q[0].transpose(0, 1),
            keys,
            values,
            layout,
            softmax_scale,
            left + 1 if left >= 0 else None,
            softcap or None,
        )
        return out.transpose(0, 1)[None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    def put(name: str, attend: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        if attend is not None:
            monkeypatch.setattr(module, "flash_attn_with_kvcache", attend, raising=False)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def made_up(
    block_size: int, device: torch.device, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedLayout]:
    layout, num_blocks = make_layout(CONTEXT_LENS, QUERY_LENS, block_size, False, 0)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, sum(QUERY_LENS), 64, generator=generator).to(device, dtype)
    pages = torch.randn(2, 2, num_blocks * block_size, 64, generator=generator).to(device, dtype)
    return query, pages[0], pages[1], layout


@pytest.mark.parametrize(("module", "table_name", "multiple"), VERSIONS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (33, None), (None, 5.0)])
def test_chunks_are_attended_as_by_the_reference(
    install: Callable[[str, Any], None],
    device: torch.device,
    module: str,
    table_name: str,
    multiple: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """The two chunks by flash-attn, the plain row and the verify pass by Triton."""
    documented = Documented(table_name, multiple)
    install(module, documented)
    (version,) = installed_versions(block_size=256)
    query, k_cache, v_cache, layout = made_up(256, device)
    limits = (0.125, window, softcap)
    actual = version.paged(query, k_cache, v_cache, layout, *limits)
    expected = reference.paged_attention(query, k_cache, v_cache, layout, *limits)
    torch.testing.assert_close(actual, expected, atol=3e-3, rtol=3e-3)
    assert documented.chunks == [(40, 340), (100, 100)]


def test_what_flash_attn_does_not_take_stays_with_triton(device: torch.device) -> None:
    documented = Documented("block_table", 256)
    version = ChunkAttention("flash-attn-2", documented, "block_table", 256)
    for case in (made_up(256, device, torch.float32), made_up(16, device)):
        expected = reference.paged_attention(*case, 0.125)
        torch.testing.assert_close(version.paged(*case, 0.125), expected, atol=3e-3, rtol=3e-3)
    assert documented.chunks == []


def test_a_version_serves_blocks_that_it_takes_and_a_broken_one_none(
    install: Callable[[str, Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert installed_versions(256) == []
    install("flash_attn", Documented("block_table", 256))
    assert installed_versions(64) == []
    assert [version.name for version in installed_versions(512)] == ["flash-attn-2"]
    install("flash_attn_interface", None)
    assert [version.name for version in installed_versions(512)] == ["flash-attn-2"]
    assert "flash-attn-3 cannot be used here" in caplog.text


def test_the_faster_backend_comes_first_and_one_that_cannot_run_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    fast = dispatch.TORCH_FLASH_CPU.paged

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        return [fast(*args, **kwargs) for _ in range(4)][-1]

    kinds: dict[str, dispatch.PagedAttentionKernel] = {"broken": broken, "slow": slow, "fast": fast}
    view = dispatch.REFERENCE.view
    backends = [dispatch.AttentionBackend(name, paged, view) for name, paged in kinds.items()]
    where = torch.device("cpu"), torch.float32, 256
    names = [backend.name for backend in dispatch.by_chunk_seconds(backends, *where)]
    assert names == ["fast", "slow", "broken"]
    assert "no kernel image" in caplog.text
