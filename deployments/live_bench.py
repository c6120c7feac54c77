"""Tokens a second of an engine at hand: a batch at a context, under one policy or another."""

import itertools
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from magicdec.batch import Batch, Plan, StepResult
from magicdec.config import ConfigError
from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import AdaptivePolicy, FixedPolicy, RoundPolicy
from magicdec.deployments.engine_builder import BuiltEngine
from magicdec.types import Request, SamplingParams

PLAIN = "plain"  # what a round is called that drafts nothing
TRIAL = " (trial)"  # what is added to the name of a round that explores
SPARE_TOKENS = 64  # of an answer: rounds that settle, and the one that has enough of them
_SETTLING_ROUNDS = 2
_NUM_MODULES = 60  # of the standard library: more text than most machines have time for


@dataclass
class Watched:
    """A policy, and what it chose last."""

    policy: RoundPolicy
    label: str = ""

    def choose(self, load: RoundLoad) -> Plan:
        plan = self.policy.choose(load)
        name = f"{plan.drafter} {plan.draft_length} x {plan.draft_budget:g}"
        self.label = name if plan.draft_length else PLAIN
        if isinstance(self.policy, AdaptivePolicy) and self.policy.chosen.explores:
            self.label += TRIAL
        return plan

    def observe(self, batch: Batch, result: StepResult, seconds: float) -> None:
        self.policy.observe(batch, result, seconds)

    def snapshot(self) -> PolicySnapshot | None:
        return self.policy.snapshot()

    def merge(self, others: PolicySnapshot) -> None:
        self.policy.merge(others)


@dataclass(frozen=True, slots=True)
class Round:
    """One step. `plan`: drafter, length x budget, or PLAIN; TRIAL added where it explores."""

    plan: str
    num_tokens: int
    seconds: float
    settles: bool = False  # before the clock starts


@dataclass(frozen=True, slots=True)
class Segment:
    """Decode rounds of a whole batch; times without what began it.

    A few rounds settle first: a drafter that observes rounds does so in a sequence's first one,
    and then seldom, which a short segment would be all about.
    """

    num_tokens: int
    seconds: float
    num_draft_tokens: int
    num_accepted_tokens: int
    rounds: tuple[Round, ...]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds

    @property
    def timed_rounds(self) -> list[Round]:
        return [played for played in self.rounds if not played.settles]


class LiveBench:
    """One engine, the policy it was built with, and prompts whose blocks stay in its prefix cache.

    It needs prefix caching, as many sequences at once as prompts, and room in the KV pool for all
    of them with answers.
    """

    def __init__(self, built: BuiltEngine) -> None:
        self.engine, self.tokenizer = built.engine, built.tokenizer
        self.served: RoundPolicy = built.engine.policy
        speculation = built.engine.config.speculation
        self.plain = FixedPolicy(Plan(speculation.drafter, 0, speculation.draft_budget))
        self._names = itertools.count()

    def prefill(
        self, prompts: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> None:
        """One token of each, after which its blocks are cached.

        `progress` hears how many tokens are computed so far.
        """
        stats = self.engine.stats
        before = stats.num_prefill_tokens
        self.engine.policy = self.plain
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        for prompt in prompts:
            self.engine.add(Request(f"r{next(self._names)}", tuple(prompt), sampling))
        while self.engine.has_unfinished():
            self.engine.step()
            if progress is not None:
                progress(stats.num_prefill_tokens - before)

    def segment(
        self,
        policy: RoundPolicy,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        seed: int,
        temperature: float,
    ) -> Segment:
        """Decodes until there are so many tokens a prompt on average; then all is given up.

        Like seeds decode like text, whatever the policy.
        """
        watched = Watched(policy)
        self.engine.policy = watched
        names = [f"r{next(self._names)}" for _ in prompts]
        for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            sampling = SamplingParams(
                temperature=temperature,
                seed=1000 * seed + i,
                max_tokens=num_tokens + SPARE_TOKENS,
                ignore_eos=True,
            )
            self.engine.add(Request(name, tuple(prompt), sampling))
        begun: set[str] = set()
        while len(begun) < len(names):
            begun |= {output.request_id for output in self.engine.step()}
        settling = [self._round(watched, settles=True) for _ in range(_SETTLING_ROUNDS)]
        found = self._decode(watched, num_tokens * len(names), settling)
        for name in names:
            self.engine.abort(name)
        return found

    def _decode(self, watched: Watched, num_tokens: int, settling: list[Round]) -> Segment:
        stats, emitted = self.engine.stats, 0
        before = stats.num_draft_tokens, stats.num_accepted_tokens
        rounds = settling
        started = time.perf_counter()
        while emitted < num_tokens:
            rounds.append(self._round(watched))
            emitted += rounds[-1].num_tokens
        seconds = time.perf_counter() - started
        drafted = stats.num_draft_tokens - before[0]
        return Segment(
            emitted, seconds, drafted, stats.num_accepted_tokens - before[1], tuple(rounds)
        )

    def _round(self, watched: Watched, *, settles: bool = False) -> Round:
        begun = time.perf_counter()
        found = sum(len(output.token_ids) for output in self.engine.step())
        return Round(watched.label, found, time.perf_counter() - begun, settles)


def read_text(path: Path | None) -> str:
    """The file, or the source of the standard library: long text that every machine has."""
    if path is not None:
        return path.read_text(errors="replace")
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return "\n".join(module.read_text(errors="replace") for module in modules[:_NUM_MODULES])


def neighbouring_windows(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Prompts of that length, one after the other. Raises ConfigError for too short a text."""
    if len(ids) < count * length:
        raise ConfigError(f"the text holds {len(ids)} tokens, {count * length} are needed")
    return [list(ids[i * length : (i + 1) * length]) for i in range(count)]
