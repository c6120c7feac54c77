"""How many replicas: by KV tokens in flight and queued, not by requests.

One prompt of 128,000 tokens is as much as six hundred of 200. A replica reports what its sequences
hold, what waits in it, what its pool holds, and what the router told it that waits for all of them.
Serve applies bounds and delays to what is wanted here.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from magicdec.stats import EngineLoad

POLICY = "magicdec.deployments.autoscaling:KvTokenPolicy"

IN_FLIGHT, QUEUED, CAPACITY = "kv_tokens_in_flight", "kv_tokens_queued", "kv_tokens_capacity"


def replica_stats(load: EngineLoad, num_queued_tokens: int) -> dict[str, float]:
    """What a replica reports; `num_queued_tokens` is of the router's queue, and so of everyone."""
    held = load.total_kv_tokens - load.free_kv_tokens
    return {
        IN_FLIGHT: float(held + load.num_waiting_tokens),
        QUEUED: float(num_queued_tokens),
        CAPACITY: float(load.total_kv_tokens),
    }


def replicas_wanted(
    metrics: Mapping[str, Mapping[Any, float]], target_usage: float, now: int
) -> int:
    """So many that their pools are filled to `target_usage` by all that is in flight and queued.

    `metrics`: name -> replica -> value. `now` where nobody has reported yet: nothing is known.
    """
    capacities = metrics.get(CAPACITY, {})
    if not capacities:
        return now
    tokens = sum(metrics.get(IN_FLIGHT, {}).values())
    tokens += max(metrics.get(QUEUED, {}).values(), default=0.0)  # all report the same queue
    room = target_usage * sum(capacities.values()) / len(capacities)
    return max(math.ceil(tokens / room), 1)


class KvTokenPolicy:
    """Serve's protocol of a policy. It keeps nothing between decisions."""

    def __init__(self, target_usage: float) -> None:
        self._target_usage = target_usage

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        wanted = replicas_wanted(
            context.aggregated_metrics or {}, self._target_usage, context.target_num_replicas
        )
        return wanted, {}
