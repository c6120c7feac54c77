"""Counters of an engine, cumulative since start. Times in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a router needs to know of a replica now."""

    num_running: int
    num_waiting: int
    free_kv_tokens: int  # can be had: what the prefix cache would give up counts
    total_kv_tokens: int
    num_prefill_tokens: int = 0  # still to compute before a first token, running and waiting
    num_waiting_tokens: int = 0  # of sequences that wait: they hold no block yet


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """The pool by what its blocks hold."""

    num_held: int  # in a sequence's table
    num_cached: int  # in none, but a prefix may find it
    num_empty: int


@dataclass(frozen=True, slots=True)
class StepForecast:
    """What a cost model foresaw of one step. `bounds`: its verify forward by what the time goes
    to, see step_bounds.py."""

    seconds: float  # as planned
    plain_seconds: float  # of the same rows, had nothing been drafted
    prefill_seconds: float  # of either: what prompts' rows take
    bounds: Mapping[str, float]


@dataclass(slots=True)
class EngineStats:
    """Rounds are steps with at least one decode row; a round's tokens exclude prefill's first.

    Prompt tokens count when a request is first admitted, and are cached or will be prefilled. What
    is computed again after a preemption counts as prefilled alone.
    """

    num_steps: int = 0
    num_rounds: int = 0
    num_prefill_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_decode_rows: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a decode row and round, recovered or bonus token included."""
        if self.num_decode_rows == 0:
            return 0.0
        return 1.0 + self.num_accepted_tokens / self.num_decode_rows

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache served; 0 before the first."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)
