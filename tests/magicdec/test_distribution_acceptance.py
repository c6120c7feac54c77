"""How often drafts are accepted, against each rule's law.

Shared noise: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) (arXiv 2408.07978; the chance that p and q
have the same argmax under one Gumbel noise). Optimal coupling: sum(min(p, q)).
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from magicdec.kernels.gumbel import Role
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import OptimalCoupling, SharedNoise, VerificationRule
from tests.distributions import PROMPT_TOKEN, chain, near, run_round, scheduled, seeded

SAMPLED = SamplingParams(max_tokens=64)
LIMIT = 4.0  # standard deviations, two-sided: 6.3e-5
Law = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


def shared_noise_law(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    ratios = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
    return float((1.0 / ratios.sum(axis=1)).sum())


def optimal_coupling_law(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(np.minimum(p, q).sum())


class OwnNoise(SharedNoise):
    """A planted fault: the draft does not see the target's noise."""

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        scores = torch.log_softmax(logits, dim=-1).numpy()
        sampler = Sampler([])
        return [
            Proposal(sampler.choose(s, r, Role.PROPOSE)) for s, r in zip(scores, rows, strict=True)
        ]


class Misstated(OptimalCoupling):
    """A planted fault: the draft's token is the likeliest one, not one drawn from the law given."""

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        return [Proposal(int(scores.argmax()), scores) for scores in logits]


def deviations(
    rule: VerificationRule, law: Law, draws: int, spread: float, draft_length: int = 4
) -> NDArray[np.float64]:
    """How far each position's count is from its law, in standard deviations.

    A position counts where all before it were accepted; its law is that of its own prefix.
    """
    target = chain(12, seed=11, spread=0.7)
    draft = near(target, seed=12, spread=spread)
    tables = [torch.softmax(t.double(), dim=-1).numpy() for t in (target, draft)]
    accepts = np.array([law(p, q) for p, q in zip(*tables, strict=True)])
    sequences = [scheduled([], sampling) for sampling in seeded(draws, SAMPLED)]
    excess, variance = np.zeros(draft_length), np.zeros(draft_length)
    for proposals, emitted in run_round(rule, target, draft, sequences, draft_length):
        prefix = [PROMPT_TOKEN, *(p.token_id for p in proposals)]
        num_accepted = len(emitted) - 1
        for i in range(min(num_accepted + 1, draft_length)):
            chance = accepts[prefix[i]]
            excess[i] += (num_accepted > i) - chance
            variance[i] += chance * (1 - chance)
    assert variance.min() > 100  # every position was reached often enough
    return np.asarray(excess / np.sqrt(variance))


RULES = [(SharedNoise, shared_noise_law), (OptimalCoupling, optimal_coupling_law)]


@pytest.mark.parametrize(("rule", "law"), RULES, ids=["shared", "optimal"])
def test_each_position_is_accepted_as_often_as_its_law_says(
    rule: Callable[[Sampler], VerificationRule], law: Law
) -> None:
    """3,000 rounds. False alarms: 2.5e-4 a rule, 6.3e-5 at each of four positions."""
    assert np.abs(deviations(rule(Sampler([])), law, 3_000, spread=0.7)).max() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.2, 0.7, 1.5])
@pytest.mark.parametrize(("rule", "law"), RULES, ids=["shared", "optimal"])
def test_each_position_is_accepted_as_its_law_says_over_many_seeds(
    rule: Callable[[Sampler], VerificationRule], law: Law, spread: float
) -> None:
    """50,000 rounds, from a near draft to a far one. False alarms: 2.5e-4 a case, six cases."""
    assert np.abs(deviations(rule(Sampler([])), law, 50_000, spread)).max() < LIMIT


def test_the_law_of_the_other_rule_is_told_apart() -> None:
    """The two laws differ by a few points, and the test sees them."""
    rule = SharedNoise(Sampler([]))
    assert deviations(rule, optimal_coupling_law, 6_000, 1.5, draft_length=1)[0] < -LIMIT


def test_a_draft_with_noise_of_its_own_is_found() -> None:
    rule = OwnNoise(Sampler([]))
    assert deviations(rule, shared_noise_law, 2_000, 0.7, draft_length=1)[0] < -LIMIT


def test_a_draft_that_misstates_its_law_is_found() -> None:
    rule = Misstated(Sampler([]))
    assert abs(deviations(rule, optimal_coupling_law, 2_000, 0.7, draft_length=1)[0]) > LIMIT


def test_optimal_coupling_accepts_more_than_shared_noise() -> None:
    """Of any p and q; the shared noise's law is at least (1 - TV) / (1 + TV)."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        p, q = generator.dirichlet(np.full(8, 0.7), size=2)
        optimal, shared = optimal_coupling_law(p, q), shared_noise_law(p, q)
        assert optimal / (2 - optimal) - 1e-12 <= shared <= optimal + 1e-12
