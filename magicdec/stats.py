"""Counters of an engine, cumulative since start. Times in seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a router needs to know of a replica now."""

    num_running: int
    num_waiting: int
    free_kv_tokens: int
    total_kv_tokens: int


@dataclass(slots=True)
class EngineStats:
    """Rounds are steps with at least one decode row; a round's tokens exclude prefill's first."""

    num_steps: int = 0
    num_rounds: int = 0
    num_prefill_tokens: int = 0
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
