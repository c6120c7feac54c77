"""`magicdec bench`: every batch at every context on an engine in this process, beside its plan."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from magicdec.config import EngineConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import AdaptivePolicy
from magicdec.deployments.bench_inputs import (
    BenchRequest,
    bench_config,
    check_context,
    check_pool,
    planned_points,
    pool_tokens,
    read_prompts,
)
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.engine_builder import build_engine
from magicdec.deployments.live_bench import PLAIN, TRIAL, LiveBench, Segment
from magicdec.deployments.plan_inputs import THIS, read_device, read_model
from magicdec.model_loader import load_tokenizer
from magicdec.planning.devices import PlanDevice
from magicdec.planning.figures import PointFigures

LEAST_PAIRS = 3
_MOST_PAIRS = 15
_PLAIN_ARM, _DRAFTING_ARM = "plain", "drafting"
_WARM_UP_SEED = 100  # above those of the pairs
_MEASURED: dict[str, float | None] = dict.fromkeys(("bandwidth", "flops", "memory", "overhead_ms"))
_BEGINNING_ROWS = 64  # of a prompt, computed anew by a segment: what is not in a whole block


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """Pairs of segments, plain and then speculative, of the same prompts and seeds."""

    batch_size: int
    context_len: int
    pairs: tuple[tuple[Segment, Segment], ...]

    @property
    def plain_tokens_per_second(self) -> float:
        """Median of the pairs, of the whole batch."""
        return statistics.median(plain.rate for plain, _ in self.pairs)

    @property
    def speculative_tokens_per_second(self) -> float:
        return statistics.median(speculative.rate for _, speculative in self.pairs)

    @property
    def speedups(self) -> list[float]:
        """Speculative over plain, pair by pair."""
        return [speculative.rate / plain.rate for plain, speculative in self.pairs]

    @property
    def speedup(self) -> float:
        return statistics.median(self.speedups)

    @property
    def acceptance(self) -> float | None:
        """Of all drafted tokens; None where none was."""
        drafted = sum(speculative.num_draft_tokens for _, speculative in self.pairs)
        accepted = sum(speculative.num_accepted_tokens for _, speculative in self.pairs)
        return accepted / drafted if drafted else None

    @property
    def choices(self) -> dict[str, float]:
        """What the rounds were, by their share, the most frequent first; trials left out."""
        plans = [r.plan for _, speculative in self.pairs for r in speculative.rounds]
        counts = Counter(plan for plan in plans if not plan.endswith(TRIAL))
        return {plan: count / counts.total() for plan, count in counts.most_common()}

    @property
    def chosen(self) -> str:
        """The most frequent choice."""
        return next(iter(self.choices), PLAIN)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Of every point what was planned and what was measured, in the order asked for."""

    model: str
    config: EngineConfig
    device: PlanDevice
    attention: str
    num_threads: int
    planned: tuple[PointFigures, ...]
    measured: tuple[MeasuredPoint, ...]

    @property
    def on_cpu(self) -> bool:
        return not torch.cuda.is_available()


def run_bench(
    config: EngineConfig, request: BenchRequest, text: Path | None, console: Console
) -> BenchReport:
    """Takes minutes, most of them for the prompts; `console` hears how far it is.

    Raises ConfigError and ModelNotFoundError before anything is measured.
    """
    config = bench_config(config, request)
    model = read_model(config.model.path, config.model.dtype, on_this_machine=True)
    check_context(request, config, model)
    num_tokens = pool_tokens(config, model)
    if num_tokens is not None:
        check_pool(request, config, model, num_tokens)
    prompts = read_prompts(request, load_tokenizer(resolve_model(config.model.path)), text)
    built = build_engine(config)
    try:
        # A draft model takes its memory out of the pool, and a GPU's is sized by what it has left:
        # only now both are known.
        check_pool(request, config, model, built.engine.load().total_kv_tokens)
        layers = model.geometry.num_layers
        device = read_device(THIS, config.model.dtype, _MEASURED, layers)
        planned = planned_points(request, config, model, device)
        measured = _measure(LiveBench(built), request, prompts, console)
    finally:
        built.engine.shutdown()
    return BenchReport(
        model=model.name,
        config=config,
        device=device,
        attention=built.engine.attention_backend,
        num_threads=torch.get_num_threads(),
        planned=tuple(planned[point] for point in request.points),
        measured=tuple(measured[point] for point in request.points),
    )


def _measure(
    bench: LiveBench, request: BenchRequest, prompts: Sequence[Sequence[int]], console: Console
) -> dict[tuple[int, int], MeasuredPoint]:
    """By batch and context. Longest first: what the cache may lose is then needed no more."""
    count, length = len(prompts), len(prompts[0])
    policy = bench.served
    if isinstance(policy, AdaptivePolicy):
        before, then = expected_seconds(policy.costs, bench, request)
        console.print(
            f"prefill of {count} x {length:,} tokens: about {_duration(before)}; then "
            f"{len(request.points)} points: about {_duration(then)}"
        )
    found = {}
    shown = console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as progress:
        prefill = progress.add_task("prefill", total=count * length)
        bench.prefill(prompts, lambda done: progress.update(prefill, completed=done))
        progress.remove_task(prefill)
        decode = progress.add_task("points", total=len(request.points))
        for batch_size, context_len in sorted(request.points, key=lambda p: (-p[1], -p[0])):
            progress.update(decode, description=f"{batch_size} x {context_len:,}")
            cut = [prompt[:context_len] for prompt in prompts[:batch_size]]
            found[batch_size, context_len] = measure_point(bench, cut, request)
            progress.advance(decode)
    return found


def measure_point(
    bench: LiveBench, prompts: Sequence[Sequence[int]], request: BenchRequest
) -> MeasuredPoint:
    """Both in turn, round by round, through pairs of segments; a first one warms up and says how
    many rounds the others have."""
    low, high = request.segment_rounds
    policies = {_PLAIN_ARM: bench.plain, _DRAFTING_ARM: bench.served}
    sampling = {"temperature": request.temperature}
    warm = bench.compare(policies, prompts, low, seed=_WARM_UP_SEED, **sampling)[_PLAIN_ARM]
    step = warm.seconds / len(warm.rounds)
    num_rounds = max(low, min(high, round(request.seconds / LEAST_PAIRS / step)))
    num_pairs = max(LEAST_PAIRS, min(_MOST_PAIRS, round(request.seconds / (num_rounds * step))))
    pairs = []
    for pair in range(num_pairs):
        found = bench.compare(policies, prompts, num_rounds, seed=pair, **sampling)
        pairs.append((found[_PLAIN_ARM], found[_DRAFTING_ARM]))
    return MeasuredPoint(len(prompts), len(prompts[0]), tuple(pairs))


def expected_seconds(
    costs: ProfiledRoundCosts, bench: LiveBench, request: BenchRequest
) -> tuple[float, float]:
    """Of the prefill, and of all points, by the engine's own profile."""
    batch, context = max(request.batch_sizes), max(request.context_lens)
    rows = min(bench.engine.config.scheduler.max_batch_tokens, batch * context)
    step = costs.prefill_seconds(RoundLoad((), rows, rows * context / 2))
    points = 0.0
    for batch_size, context_len in request.points:
        begun = batch_size * min(_BEGINNING_ROWS, context_len)
        begin = costs.prefill_seconds(RoundLoad((), begun, float(begun * context_len)))
        points += 2 * request.seconds + 2 * (LEAST_PAIRS + 1) * begin
    return batch * context / rows * step, points


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
