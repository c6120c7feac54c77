"""What an output file holds already: which rows are answered, under which keys.

Sixteen bytes a row: the hash of its id, and the first half of its key.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from magicdec.deployments.batch_row import id_hash
from magicdec.deployments.settings import SettingsError

ID_PREFIX = "batch_req_"
_MASK = (1 << 64) - 1


class OutputError(SettingsError):
    """An output file that cannot be gone on with; nothing in it was changed."""


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """What matters of a line of the output."""

    custom_id: str
    key: str
    is_error: bool


def parse_line(line: bytes, place: str) -> AnsweredLine:
    """Raises OutputError."""
    try:
        record = from_json(line)
        row_id, custom_id, error = record["id"], record["custom_id"], record["error"]
        key = str(row_id).removeprefix(ID_PREFIX)
        int(key, 16)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{place}: not a line that this command wrote") from error
    return AnsweredLine(str(custom_id), key, error is not None)


@dataclass(slots=True)
class Answered:
    """The index. `add` what was written, `freeze` to look up."""

    _ids: "array[int]" = field(default_factory=lambda: array("Q"))
    _keys: "array[int]" = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, custom_id: str, key: str) -> None:
        self._ids.append(id_hash(custom_id))
        self._keys.append(short_key(key))

    def freeze(self) -> "AnsweredIndex":
        ids = np.frombuffer(self._ids, np.uint64) if self._ids else np.empty(0, np.uint64)
        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.empty(0, np.uint64)
        order = np.argsort(ids, kind="stable")
        return AnsweredIndex(ids[order], keys[order])


@dataclass(frozen=True, slots=True)
class AnsweredIndex:
    """Frozen, by id; it can be sent to another process."""

    ids: NDArray[np.uint64]  # [num_rows], ascending
    keys: NDArray[np.uint64]  # [num_rows], of the same rows

    def __len__(self) -> int:
        return len(self.ids)

    def key_of(self, custom_id: str) -> int | None:
        """Of the line that answers this id; None: there is none."""
        if not len(self.ids):
            return None
        wanted = np.uint64(id_hash(custom_id))
        place = int(np.searchsorted(self.ids, wanted))
        if place == len(self.ids) or self.ids[place] != wanted:
            return None
        return int(self.keys[place])

    def has(self, custom_id: str, key: str) -> bool:
        return self.key_of(custom_id) == short_key(key)


def short_key(key: str) -> int:
    return int(key[:16], 16) & _MASK


@dataclass(frozen=True, slots=True)
class OutputState:
    """An output file as it was found. `end`: where its last whole line ends; what follows is torn,
    the line that was being written when its writer died."""

    answered: Answered
    num_errors: int
    end: int
    size: int


def read_output(path: Path) -> OutputState:
    """Raises OutputError naming file and line: of one that is not ours, of an id that has two."""
    answered, num_errors, last = Answered(), 0, 0
    for number, (line, end) in enumerate(whole_lines(path), 1):
        last = end
        found = parse_line(line, f"{path}:{number}")
        answered.add(found.custom_id, found.key)
        num_errors += found.is_error
    ids = answered.freeze().ids
    if len(ids) and bool((ids[1:] == ids[:-1]).any()):
        raise OutputError(f"{path}: {_twice(path)}")
    return OutputState(answered, num_errors, last, path.stat().st_size if path.exists() else 0)


def whole_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each line that is whole, and where it ends in the file."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield line, end


def _twice(path: Path) -> str:
    """Reads the file again, to name the lines."""
    seen: dict[int, int] = {}
    for number, (line, _) in enumerate(whole_lines(path), 1):
        custom_id = parse_line(line, f"{path}:{number}").custom_id
        first = seen.setdefault(id_hash(custom_id), number)
        if first != number:
            return f"lines {first} and {number} both answer {custom_id!r}"
    return "two lines answer one id"
