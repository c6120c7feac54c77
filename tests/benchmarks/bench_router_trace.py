"""The router benchmark's requests: seeded lengths and arrivals, and prompts cut from a text."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from magicdec.simulation.trace import PoissonTraffic, TraceError, TraceRequest

TokenIds = tuple[int, ...]


def make_trace(traffic: PoissonTraffic) -> list[TraceRequest]:
    """The simulator's own Poisson requests, but no two prompts of a group are equal.

    A prompt with the shared prefix has text of its own after it: its length is drawn from the same
    law above the prefix, where the simulator lengthens a shorter one to the prefix alone. Raises
    TraceError where the bounds leave no room for that.
    """
    low, high = traffic.prompt_tokens
    least = traffic.num_prefix_tokens + low
    if traffic.prefix_share and least > high:
        raise TraceError(
            f"prompt_tokens must reach {least} (prefix and shortest prompt), got {high}"
        )
    plain = replace(traffic, num_prefix_tokens=0).requests()
    return [
        request
        if request.prefix_id is None
        else replace(
            request,
            num_prompt_tokens=_stretch(request.num_prompt_tokens, (low, high), (least, high)),
            num_prefix_tokens=traffic.num_prefix_tokens,
        )
        for request in plain
    ]


def scale_arrivals(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests, `factor` times as far apart."""
    return [replace(request, arrival_s=request.arrival_s * factor) for request in requests]


def sample(requests: Sequence[TraceRequest], count: int) -> list[int]:
    """Numbers of `count` requests that stand for all: evenly spaced by prefix, then by length.

    Longest first: run in this order on a closed loop, the end is not one long straggler.
    """
    order = sorted(
        range(len(requests)),
        key=lambda i: (requests[i].prefix_id or "", requests[i].num_prompt_tokens),
    )
    count = min(count, len(order))
    chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    return sorted(chosen, key=lambda i: -requests[i].num_prompt_tokens)


def cut_prompts(requests: Sequence[TraceRequest], token_ids: Sequence[int]) -> list[TokenIds]:
    """One prompt a request: the prefix of its group, then a window of the text that nobody else
    has. Raises ValueError where the text is too short."""
    sizes = {r.prefix_id: r.num_prefix_tokens for r in requests if r.prefix_id is not None}
    own = sum(r.num_prompt_tokens - r.num_prefix_tokens for r in requests)
    if len(token_ids) < (needed := own + sum(sizes.values())):
        raise ValueError(f"the text holds {len(token_ids)} tokens, the prompts need {needed}")
    start = 0

    def take(count: int) -> TokenIds:
        nonlocal start
        start += count
        return tuple(token_ids[start - count : start])

    prefixes = {name: take(size) for name, size in sizes.items()}
    return [
        (prefixes[r.prefix_id] if r.prefix_id is not None else ())
        + take(r.num_prompt_tokens - r.num_prefix_tokens)
        for r in requests
    ]


def write_trace(path: Path, requests: Sequence[TraceRequest]) -> None:
    """As magicdec/simulation/trace.py reads it."""
    lines = []
    for request in requests:
        row: dict[str, Any] = {
            "arrival_s": request.arrival_s,
            "num_prompt_tokens": request.num_prompt_tokens,
            "num_output_tokens": request.num_output_tokens,
            "max_tokens": request.max_tokens,
        }
        if request.prefix_id is not None:
            row |= {
                "prefix_id": request.prefix_id,
                "num_prefix_tokens": request.num_prefix_tokens,
            }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _stretch(num_tokens: int, old: tuple[int, int], new: tuple[int, int]) -> int:
    """The length at the same quantile of another log-uniform law."""
    if old[0] == old[1]:
        return new[1]
    quantile = math.log(num_tokens / old[0]) / math.log(old[1] / old[0])
    return round(new[0] * math.exp(quantile * math.log(new[1] / new[0])))
