"""Optional API keys: read from a file, kept as digests, compared in constant time, never logged."""

import hashlib
import hmac
from pathlib import Path

BEARER = "bearer "
ANYONE = ""
_NAME_LENGTH = 16


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

    def client_of(self, authorization: str | None) -> str | None:
        """A name for the key's holder that does not give the key away; None: refused.

        Compares with every key, so that the time says nothing about which one matched. Where no
        key is asked for all are one client: a key that nobody checks is no identity.
        """
        if not self._digests:
            return ANYONE
        header = authorization or ""
        if not header.lower().startswith(BEARER):
            return None
        given = _digest(header[len(BEARER) :].strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:_NAME_LENGTH] if any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
