"""Files by local path or fsspec URL, opened with errors that a person can use."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from magicdec.deployments.settings import SettingsError


def is_url(path: str) -> bool:
    """Anything but a local path; file:// is one."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()


def file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and its name there. Raises SettingsError."""
    try:
        system, name = url_to_fs(path if is_url(path) else str(local_path(path).absolute()))
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise SettingsError(f"cannot open {path}: {error}") from error
    return system, str(name)


@contextmanager
def opened(path: str, *, compression: str | None = "infer") -> Iterator[IO[bytes]]:
    """The bytes of a file; .zst, .gz and the like are unpacked. Raises SettingsError."""
    is_zstd = compression is not None and path.endswith(".zst")
    name = path if is_url(path) else str(local_path(path))
    with reading(path):
        file = fsspec.open(name, "rb", compression=None if is_zstd else compression)
        with file as stream:
            yield _unpacked(stream) if is_zstd else stream


def _unpacked(stream: IO[bytes]) -> IO[bytes]:
    """fsspec's own zstd is another package, and its streams know no lines."""
    import pyarrow as pa  # tens of megabytes, for the few inputs that are so

    return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what storage says into SettingsError naming the path."""
    try:
        yield
    except SettingsError:
        raise
    except FileNotFoundError as error:
        raise SettingsError(f"cannot read {path}: no such file or folder") from error
    except (OSError, EOFError, ImportError) as error:
        raise SettingsError(f"cannot read {path}: {_reason(error)}") from error


def check_can_be_written(path: Path) -> None:
    """Without touching it. Raises SettingsError."""
    if path.is_dir():
        raise SettingsError(f"cannot write {path}: it is a folder")
    if path.exists():
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
            raise SettingsError(f"cannot write {path}: not a file that may be read and written")
    elif not path.parent.is_dir():
        raise SettingsError(f"cannot write {path}: there is no folder {path.parent}")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        raise SettingsError(f"cannot write {path}: no file may be made in {path.parent}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
