"""Plain, fixed and adaptive drafts of one engine, to be compared on the same prompts."""

import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from magicdec.batch import Plan
from magicdec.config import (
    AdaptiveConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from magicdec.control.round_policy import FixedPolicy, RoundPolicy
from magicdec.deployments.bench_text import neighbouring_windows, read_text
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.engine_builder import build_engine
from magicdec.deployments.live_bench import (
    PLAIN,
    LiveBench,
    Segment,
)

ADAPTIVE = "adaptive"
FIXED = {f"{n} x {b}": (n, b) for n, b in ((2, 512), (4, 512), (6, 512), (4, 256), (4, 1024))}
ARMS = (PLAIN, *FIXED, ADAPTIVE)


class Bench:
    """Arms by name over one engine and one adaptive policy."""

    def __init__(self, model: str, dtype: str, num_tokens: int, max_num_seqs: int) -> None:
        self.config = EngineConfig(
            model=ModelConfig(resolve_model(model), dtype),
            cache=CacheConfig(num_blocks=-(-num_tokens // 64)),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
            speculation=SpeculativeConfig(adaptive=AdaptiveConfig()),
            parallel=ParallelConfig(num_threads=torch.get_num_threads()),  # as the shell says
        )
        self.live = LiveBench(build_engine(self.config))

    def token_ids(self, text: Path | None) -> list[int]:
        return list(self.live.tokenizer(read_text(text))["input_ids"])

    def policy(self, arm: str) -> RoundPolicy:
        return policy_of(self.live, arm)

    def token_prompts(self, ids: Sequence[int], count: int, length: int) -> list[list[int]]:
        """Neighbouring windows. Raises SystemExit where the text is too short."""
        try:
            return neighbouring_windows(ids, count, length)
        except ConfigError as error:
            raise SystemExit(str(error)) from error

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.live.prefill(prompts)

    def compare(
        self,
        arms: Sequence[str],
        prompts: Sequence[Sequence[int]],
        num_rounds: int,
        *,
        seed: int,
        temperature: float,
    ) -> dict[str, Segment]:
        """See LiveBench."""
        policies = {arm: self.policy(arm) for arm in arms}
        return self.live.compare(policies, prompts, num_rounds, seed=seed, temperature=temperature)


def policy_of(live: LiveBench, arm: str) -> RoundPolicy:
    if arm == ADAPTIVE:
        return live.served
    if arm == PLAIN:
        return live.plain
    return FixedPolicy(Plan(live.engine.config.speculation.drafter, *FIXED[arm]))


def describe(bench: Bench) -> dict[str, str | int]:
    """The header of a report."""
    return {
        "model": bench.config.model.path.rstrip("/").rpartition("/")[2],
        "dtype": bench.config.model.dtype,
        "attention": bench.live.engine.attention_backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "arguments": shlex.join(sys.argv[1:]),
    }
