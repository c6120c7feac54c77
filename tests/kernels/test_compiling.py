"""Compiling the C++ kernels: once, anew where the result is damaged, and what serves without."""

import ctypes
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from magicdec.kernels import dispatch
from magicdec.kernels.compiled import CompileError, compiled_library, load_compiled

needs_compiler = pytest.mark.skipif(compiled_library() is None, reason="there is no compiler here")


def test_where_there_is_a_compiler_the_sources_compile() -> None:
    """Else every test of a compiled kernel would be skipped."""
    compiler = str(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    assert compiled_library() is not None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompileError, match=compiler):
        load_compiled(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="file"):
        load_compiled(tmp_path / "file" / "folder")


@needs_compiler
def test_a_library_is_compiled_once_and_a_damaged_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_compiled(tmp_path)
    (library,) = tmp_path.iterdir()
    written = library.stat().st_mtime_ns
    assert isinstance(load_compiled(tmp_path), ctypes.CDLL)
    assert library.stat().st_mtime_ns == written
    other = tmp_path / "other" / library.name
    other.parent.mkdir()
    other.write_text("not a library")
    assert isinstance(load_compiled(other.parent), ctypes.CDLL)
    assert other.stat().st_size == library.stat().st_size
    with monkeypatch.context() as patched:
        patched.setenv("CXX", "no-such-compiler")
        assert isinstance(load_compiled(tmp_path), ctypes.CDLL)


def test_torch_serves_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "compiled_library", lambda: None)
    with caplog.at_level(logging.INFO):
        backend = dispatch.select_backend(torch.device("cpu"), torch.float32)
    assert backend is dispatch.TORCH_FLASH_CPU
    assert "attention backend: torch-flash-cpu" in caplog.text
