"""Which drafts would be accepted: a seeded process of each request, whoever drafts and how far."""

import math
from dataclasses import dataclass

import numpy as np

from magicdec.config import MAX_DRAFT_LENGTH, ConfigError, check_at_least
from magicdec.simulation.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class AcceptanceLaw:
    """Each output token is guessed right with the probability of its request, independently.

    The request's own acceptance is the trace's, or drawn: log-odds are normal around those of
    `acceptance`, with standard deviation `spread`. Raises ConfigError naming field, value and
    limit.
    """

    acceptance: float = 0.8
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.acceptance < 1.0:
            raise ConfigError(f"acceptance must be between 0 and 1, got {self.acceptance}")
        check_at_least("acceptance_spread", self.spread, 0)
        if not self.spread < math.inf:
            raise ConfigError(f"acceptance_spread must be finite, got {self.spread}")
        check_at_least("seed", self.seed, 0)

    def runs(self, request: TraceRequest, number: int) -> bytes:
        """Drafts accepted in a row from each output token on, [num_output_tokens], up to
        MAX_DRAFT_LENGTH.

        What a token's draft comes to is a function of seed, `number` and the token alone, so
        policies and draft lengths are compared on the same luck.
        """
        rng = np.random.default_rng((self.seed, number))
        log_odds = math.log(self.acceptance / (1.0 - self.acceptance))
        drawn = 1.0 / (1.0 + math.exp(-log_odds - self.spread * rng.standard_normal()))
        acceptance = drawn if request.acceptance is None else request.acceptance
        hits = rng.random(request.num_output_tokens) < acceptance
        tokens = np.arange(len(hits))
        misses = np.where(hits, len(hits) + MAX_DRAFT_LENGTH, tokens)
        next_miss = np.minimum.accumulate(misses[::-1])[::-1]
        runs: bytes = np.minimum(next_miss - tokens, MAX_DRAFT_LENGTH).astype(np.uint8).tobytes()
        return runs
