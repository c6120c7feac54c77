"""The output file: one line a row, appended whole and handed to the system at once.

A writer that is killed leaves whole lines and at most one torn one, which the next run cuts off and
answers again. Lines are taken out (errors to be tried again) by writing the others to a new file
that replaces this one by a rename: at every moment the file holds each id at most once.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicdec.deployments.batch_answered import (
    ID_PREFIX,
    AnsweredLine,
    OutputError,
    OutputState,
    parse_line,
    whole_lines,
)

SYNC_PERIOD_S = 1.0  # a machine that loses power loses so much, a process that dies loses nothing


class JobStopped(RuntimeError):
    """The job cannot go on now; what is answered is in the output, the same command goes on."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of a row: `response` or `error`, as the format has them; tokens for figures."""

    custom_id: str
    key: str
    response: dict[str, Any] | None
    error: dict[str, Any] | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_rounds: int = 0
    num_accepted_tokens: int = 0

    def line(self) -> bytes:
        record = {
            "id": f"{ID_PREFIX}{self.key}",
            "custom_id": self.custom_id,
            "response": self.response,
            "error": self.error,
        }
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "surrogatepass") + b"\n"


class OutputFile:
    """The file, held by one process at a time: the system lets go of it when the holder dies."""

    def __init__(self, path: Path) -> None:
        """Makes it where there is none. Raises OutputError."""
        self._path = path
        self._fd = _open(path, os.O_CREAT)
        self._synced_at = time.monotonic()
        _lock(self._fd, path)

    def cut_torn_line(self, state: OutputState) -> None:
        """`state` as it was read while this holds the file."""
        if state.size > state.end:
            os.ftruncate(self._fd, state.end)

    def keep(self, is_kept: Callable[[AnsweredLine], bool]) -> None:
        """Takes out all other lines. The new file is held before it has the name."""
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.unlink(missing_ok=True)
        fd = _open(partial, os.O_CREAT)
        _lock(fd, partial)
        for number, (line, _) in enumerate(whole_lines(self._path), 1):
            if is_kept(parse_line(line, f"{self._path}:{number}")):
                _write(fd, line)
        os.fsync(fd)
        os.replace(partial, self._path)
        os.close(self._fd)
        self._fd = fd

    def append(self, result: RowResult) -> None:
        """Returns when the line is the system's: this process may die then. Raises JobStopped."""
        try:
            _write(self._fd, result.line())
            if time.monotonic() - self._synced_at >= SYNC_PERIOD_S:
                os.fsync(self._fd)
                self._synced_at = time.monotonic()
        except OSError as error:
            raise JobStopped(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {(error.strerror or '').lower()}") from error


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"{path} is being written by another run") from error


def _write(fd: int, line: bytes) -> None:
    written = 0
    while written < len(line):  # a full disk takes a part, then says so
        written += os.write(fd, line[written:])
