"""What is asked of a simulated cluster: a seeded Poisson stream, or a file of real arrivals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magicdec.routing.prefix_affinity import num_prefix_hashes

DEFAULT_PREFIX_TOKENS = 1024  # of a trace's prefix, where the line does not say

_FIELDS = {
    "arrival_s",
    "num_prompt_tokens",
    "num_output_tokens",
    "max_tokens",
    "prefix_id",
    "num_prefix_tokens",
    "key",
    "acceptance",
}


class TraceError(ValueError):
    """A trace that cannot be used; the message names line, field, value and limit."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Its first `num_prefix_tokens` are those of every other with its `prefix_id`;
    `max_tokens` is the limit that its client gave, of which it uses `num_output_tokens`.
    `acceptance` is the probability that a token drafted for it is accepted; None: unknown."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    prefix_id: str | None = None
    num_prefix_tokens: int = 0
    key: str = ""
    acceptance: float | None = None

    def prefix_hashes(self, number: int) -> tuple[int, ...]:
        """As prefix_affinity.prefix_hashes has them for real prompts: shared ones for the shared
        beginning, those of request `number` alone after it."""
        shared = num_prefix_hashes(self.num_prefix_tokens) if self.prefix_id is not None else 0
        return tuple(
            hash((self.prefix_id, i)) if i < shared else hash((number, i))
            for i in range(num_prefix_hashes(self.num_prompt_tokens))
        )


@dataclass(frozen=True, slots=True)
class PoissonTraffic:
    """Requests that come independently. Lengths are log-uniform between their bounds, so that
    every length class has as many. Raises TraceError naming field, value and limit."""

    num_requests: int
    requests_per_s: float
    prompt_tokens: tuple[int, int] = (100, 4000)
    output_tokens: tuple[int, int] = (32, 32)
    max_tokens: int | None = None  # the limit that clients give; None: the longest output
    prefix_share: float = 0.0  # of the requests
    num_prefixes: int = 1
    num_prefix_tokens: int = 1000
    num_keys: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low in (
            ("num_requests", self.num_requests, 1),
            ("num_prefixes", self.num_prefixes, 1),
            ("num_keys", self.num_keys, 1),
            ("num_prefix_tokens", self.num_prefix_tokens, 0),
        ):
            if value < low:
                raise TraceError(f"{name} must be at least {low}, got {value}")
        if not 0.0 < self.requests_per_s < math.inf:
            raise TraceError(f"requests_per_s must be above 0, got {self.requests_per_s}")
        if not 0.0 <= self.prefix_share <= 1.0:
            raise TraceError(f"prefix_share must be between 0 and 1, got {self.prefix_share}")
        for name, (low, high) in (
            ("prompt_tokens", self.prompt_tokens),
            ("output_tokens", self.output_tokens),
        ):
            if not 1 <= low <= high:
                raise TraceError(f"{name} must be bounds from 1 upwards, got {low}, {high}")

    def requests(self) -> list[TraceRequest]:
        """The same for the same fields. A prompt with a shared prefix is at least as long as it."""
        rng = np.random.default_rng(self.seed)
        count = self.num_requests
        arrivals = np.cumsum(rng.exponential(1.0 / self.requests_per_s, count))
        prompts = _log_uniform(rng, self.prompt_tokens, count)
        outputs = _log_uniform(rng, self.output_tokens, count)
        shares = rng.random(count) < self.prefix_share
        prefixes = rng.integers(self.num_prefixes, size=count)
        keys = rng.integers(self.num_keys, size=count)
        limit = self.max_tokens or self.output_tokens[1]
        return [
            TraceRequest(
                arrival_s=float(arrivals[i]),
                num_prompt_tokens=max(int(prompts[i]), self.num_prefix_tokens * int(shares[i])),
                num_output_tokens=min(int(outputs[i]), limit),
                max_tokens=limit,
                prefix_id=f"prefix-{prefixes[i]}" if shares[i] else None,
                num_prefix_tokens=self.num_prefix_tokens if shares[i] else 0,
                key=f"key-{keys[i]}",
            )
            for i in range(count)
        ]


def read_trace(path: str | Path) -> list[TraceRequest]:
    """A JSONL file, one request a line: arrival_s, num_prompt_tokens, num_output_tokens, and
    optionally prefix_id, num_prefix_tokens, key, acceptance and max_tokens (else the longest answer
    of all). A line with max_tokens alone used them up.

    Sorted by arrival. Raises TraceError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    found = [_parse(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TraceError(f"{path} holds no request")
    longest = max(fields["num_output_tokens"] for fields in found)
    requests = [TraceRequest(**{"max_tokens": longest, **fields}) for fields in found]
    return sorted(requests, key=lambda request: request.arrival_s)


def check_fits(requests: Sequence[TraceRequest], total_kv_tokens: int) -> None:
    """Raises TraceError for a request that no replica could ever hold."""
    for i, request in enumerate(requests):
        needed = request.num_prompt_tokens + request.num_output_tokens
        if needed > total_kv_tokens:
            raise TraceError(
                f"request {i} needs {needed} KV tokens, a replica has {total_kv_tokens}"
            )


def _log_uniform(
    rng: np.random.Generator, bounds: tuple[int, int], count: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    low, high = bounds
    return np.exp(rng.uniform(math.log(low), math.log(high), count)).round().astype(np.int64)


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{where} must be an object, got {fields!r}")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise TraceError(f"{where}: {unknown[0]} is not a field of a trace")
    arrival: Any = fields.get("arrival_s")
    if not (_is_number(arrival) and 0.0 <= arrival < math.inf):
        raise TraceError(f"{where}: arrival_s must be a number from 0 upwards, got {arrival!r}")
    if fields.get("prefix_id") is not None:
        fields["prefix_id"] = str(fields["prefix_id"])
        tokens = fields.setdefault("num_prefix_tokens", DEFAULT_PREFIX_TOKENS)
        prompt = fields.get("num_prompt_tokens")
        if type(prompt) is int and type(tokens) is int:
            fields["num_prefix_tokens"] = min(tokens, prompt)
    fields.setdefault("num_output_tokens", fields.get("max_tokens"))
    for name in ("num_prompt_tokens", "num_output_tokens", "max_tokens", "num_prefix_tokens"):
        optional = name in ("max_tokens", "num_prefix_tokens") and name not in fields
        low = 0 if name == "num_prefix_tokens" else 1
        value = fields.get(name)
        if not optional and not (type(value) is int and value >= low):
            raise TraceError(f"{where}: {name} must be a whole number from {low}, got {value!r}")
    if fields.get("max_tokens", math.inf) < fields["num_output_tokens"]:
        raise TraceError(
            f"{where}: max_tokens must be at least num_output_tokens "
            f"({fields['num_output_tokens']}), got {fields['max_tokens']}"
        )
    acceptance: Any = fields.get("acceptance")
    if acceptance is not None and not (_is_number(acceptance) and 0.0 <= acceptance <= 1.0):
        raise TraceError(f"{where}: acceptance must be between 0 and 1, got {acceptance!r}")
    fields["key"] = str(fields.get("key", ""))
    return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
