"""Text to decode for a measurement, and prompts out of it. Imports neither torch nor Ray."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from magicdec.config import ConfigError

_NUM_MODULES = 60  # of the standard library: more text than most machines have time for


def read_text(path: Path | None) -> str:
    """The file, or the source of the standard library: long text that every machine has."""
    if path is not None:
        return path.read_text(errors="replace")
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return "\n".join(module.read_text(errors="replace") for module in modules[:_NUM_MODULES])


def neighbouring_windows(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Prompts of that length, one after the other. Raises ConfigError for too short a text."""
    if len(ids) < count * length:
        raise ConfigError(f"the text holds {len(ids)} tokens, {count * length} are needed")
    return [list(ids[i * length : (i + 1) * length]) for i in range(count)]
