"""Optional API keys: read from a file, kept as digests, compared in constant time, never logged."""

import hashlib
import hmac
from pathlib import Path

BEARER = "bearer "


class ApiKeys:
    """The accepted keys. None at all means that everyone may call."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: str | None) -> "ApiKeys":
        """One key a line; empty lines and lines that begin with # are skipped.

        Raises ValueError when the file holds no key: an empty file must not open the server.
        """
        if path is None:
            return cls([])
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"api_keys_file {path} holds no key")
        return cls(keys)

    def accepts(self, authorization: str | None) -> bool:
        """Compares with every key, so that the time says nothing about which one matched."""
        if not self._digests:
            return True
        header = authorization or ""
        if not header.lower().startswith(BEARER):
            return False
        given = _digest(header[len(BEARER) :].strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
