"""The rows of a batch by one engine of this process, as a job sends them: long ones first.

One engine serves all arms, and its prefix cache holds all documents. Arms run in turn, and back, so
that a machine that slows down slows all of them alike. The adaptive policy goes on with what it has
learnt, as a served one does.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magicdec.config import (
    AdaptiveConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
)
from magicdec.deployments.batch_engines import UNBOUNDED_S
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.engine_builder import build_engine
from magicdec.deployments.live_bench import LiveBench
from magicdec.types import Request, SamplingParams
from tests.benchmarks.policy_arms import policy_of

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Job:
    """All rows, from the first to the last one's end."""

    num_tokens: int
    seconds: float
    mean_acceptance_length: float


class InProcess:
    """The engine, and the policy that it was built with."""

    def __init__(self, prompts: Sequence[Sequence[int]], args: argparse.Namespace) -> None:
        blocks = sum(-(-(len(ids) + args.tokens) // _BLOCK) + 1 for ids in prompts)
        config = EngineConfig(
            model=ModelConfig(resolve_model(args.model), args.dtype),
            cache=CacheConfig(_BLOCK, num_blocks=blocks),
            speculation=SpeculativeConfig(
                adaptive=AdaptiveConfig(inter_token_target_s=UNBOUNDED_S)
            ),
            parallel=ParallelConfig(num_threads=args.threads),
        )
        self._live = LiveBench(build_engine(config))
        self._prompts = sorted(prompts, key=len, reverse=True)
        self._temperature = args.temperature
        self._names = itertools.count()

    def run(self, arm: str, num_tokens: int) -> Job:
        """So many tokens a row."""
        engine, stats = self._live.engine, self._live.engine.stats
        engine.policy = policy_of(self._live, arm)
        rows, accepted = stats.num_decode_rows, stats.num_accepted_tokens
        started, num_emitted = time.perf_counter(), 0
        for request in self._requests(num_tokens):
            engine.add(request)
        while engine.has_unfinished():
            num_emitted += sum(len(output.token_ids) for output in engine.step())
        rows, accepted = stats.num_decode_rows - rows, stats.num_accepted_tokens - accepted
        seconds = time.perf_counter() - started
        return Job(num_emitted, seconds, 1.0 + accepted / max(rows, 1))

    def _requests(self, num_tokens: int) -> Iterator[Request]:
        """Of the same seeds in every job: like arms decode like texts."""
        for seed, ids in enumerate(self._prompts):
            sampling = SamplingParams(
                temperature=self._temperature, seed=seed, max_tokens=num_tokens, ignore_eos=True
            )
            yield Request(f"r{next(self._names)}", tuple(ids), sampling)
