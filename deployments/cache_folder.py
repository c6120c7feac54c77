"""Where this project keeps what it can make again: converted models, profiles of the machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`magicdec` in the user's cache (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "magicdec"
