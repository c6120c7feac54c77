"""Tokens a second of an engine at hand: a batch at a context, under one policy or another."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from magicdec.batch import Batch, Plan, StepResult
from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_policy import AdaptivePolicy, FixedPolicy, RoundPolicy
from magicdec.deployments.engine_builder import BuiltEngine
from magicdec.stats import StepForecast
from magicdec.types import Request, SamplingParams

PLAIN = "plain"  # what a round is called that drafts nothing
TRIAL = " (trial)"  # what is added to the name of a round that explores
_TOKENS_PER_ROUND = 6  # of a request, on the mean over policies; drafts rarely reach it
_SPARE_TOKENS = 64


@dataclass
class Watched:
    """A policy, and what it chose last. None of its plans stands: the next round is another's, to
    whose time a step begun ahead would go."""

    policy: RoundPolicy
    label: str = ""

    def choose(self, load: RoundLoad) -> Plan:
        plan = self.policy.choose(load)
        name = f"{plan.drafter} {plan.draft_length} x {plan.draft_budget:g}"
        self.label = name if plan.draft_length else PLAIN
        if isinstance(self.policy, AdaptivePolicy) and self.policy.chosen.explores:
            self.label += TRIAL
        return replace(plan, stands=False)

    def forecast(self) -> StepForecast | None:
        return self.policy.forecast()

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


@dataclass(frozen=True, slots=True)
class Segment:
    """Decode rounds of a whole batch under one policy; times without what began it."""

    num_tokens: int
    seconds: float
    num_draft_tokens: int
    num_accepted_tokens: int
    rounds: tuple[Round, ...]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


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

    def compare(
        self,
        policies: Mapping[str, RoundPolicy],
        prompts: Sequence[Sequence[int]],
        num_rounds: int,
        *,
        seed: int,
        temperature: float,
    ) -> dict[str, Segment]:
        """So many rounds of each policy on one live batch, in turn, round by round; then all is
        given up. What else the machine does falls on all of them alike.

        Fewer where a request ends before. Like seeds decode like text, whatever the policies.
        """
        num_tokens = answer_tokens(num_rounds, len(policies))
        names = self._begin(prompts, num_tokens, seed, temperature)
        watched = {name: Watched(policy) for name, policy in policies.items()}
        found = {name: _Counting() for name in policies}
        order = list(policies)
        for turn in range(num_rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                self._round(watched[name], found[name])
            if self.engine.load().num_running < len(names):
                break
        for request_id in names:
            self.engine.abort(request_id)
        return {name: counting.segment() for name, counting in found.items()}

    def _begin(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, seed: int, temperature: float
    ) -> list[str]:
        """Until all decode, and one round more: a drafter that observes rounds does so in a
        request's first one, and then seldom."""
        speculation = self.engine.config.speculation
        self.engine.policy = self.plain
        names = [f"r{next(self._names)}" for _ in prompts]
        for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            sampling = SamplingParams(
                temperature=temperature,
                seed=1000 * seed + i,
                max_tokens=num_tokens,
                ignore_eos=True,
            )
            self.engine.add(Request(name, tuple(prompt), sampling))
        begun: set[str] = set()
        while len(begun) < len(names):
            begun |= {output.request_id for output in self.engine.step()}
        budget = max(speculation.draft_budget, speculation.selection_budget)
        self.engine.policy = FixedPolicy(Plan(speculation.drafter, 1, budget))
        self.engine.step()
        return names

    def _round(self, watched: Watched, found: "_Counting") -> None:
        stats = self.engine.stats
        self.engine.policy = watched
        drafted, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
        begun = time.perf_counter()
        num_tokens = sum(len(output.token_ids) for output in self.engine.step())
        found.rounds.append(Round(watched.label, num_tokens, time.perf_counter() - begun))
        found.num_draft_tokens += stats.num_draft_tokens - drafted
        found.num_accepted_tokens += stats.num_accepted_tokens - accepted


@dataclass(slots=True)
class _Counting:
    rounds: list[Round] = field(default_factory=list)
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def segment(self) -> Segment:
        return Segment(
            sum(played.num_tokens for played in self.rounds),
            sum(played.seconds for played in self.rounds),
            self.num_draft_tokens,
            self.num_accepted_tokens,
            tuple(self.rounds),
        )


def answer_tokens(num_rounds: int, num_policies: int) -> int:
    """Room for an answer through so many rounds of each policy."""
    return num_rounds * num_policies * _TOKENS_PER_ROUND + _SPARE_TOKENS
