"""What either rule emits has the target's law, token by token and as a sequence.

`fit` and `conditional_fit` give p-values; FALSE_ALARM is the rate of one of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from magicdec.batch import ScheduledSequence
from magicdec.kernels.gumbel import Role
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import OptimalCoupling, SharedNoise, VerificationRule
from tests.distributions import (
    FALSE_ALARM,
    chain,
    conditional_fit,
    count,
    decode,
    fit,
    near,
    run_round,
    scheduled,
    seeded,
    sequence_law,
)

SAMPLED = SamplingParams(max_tokens=64)
RULES = [SharedNoise, OptimalCoupling]
Rule = Callable[[Sampler], VerificationRule]
Pair = tuple[torch.Tensor, torch.Tensor]


class Reuses(Sampler):
    """A planted fault: one role draws what another has drawn."""

    def __init__(self, role: Role, instead: Role) -> None:
        super().__init__([])
        self._swap = {role: instead}

    def choose(self, scores: NDArray[np.floating[Any]], row: SamplerRow, role: Role) -> int:
        return super().choose(scores, row, self._swap.get(role, role))

    def uniform(self, row: SamplerRow, role: Role) -> float:
        return super().uniform(row, self._swap.get(role, role))


def first_token_fit(
    rule: VerificationRule, target: torch.Tensor, draft: torch.Tensor, draws: int
) -> float:
    """One drafted token a seed; the p-value of the first emitted one."""
    sequences = [scheduled([], sampling) for sampling in seeded(draws, SAMPLED)]
    rounds = run_round(rule, target, draft, sequences, draft_length=1)
    tokens = np.array([[emitted[0]] for _, emitted in rounds])
    return fit(count(tokens, len(target)), sequence_law(target, SAMPLED, 1))


def opposed() -> tuple[torch.Tensor, torch.Tensor]:
    """Target and draft whose rejections are many and touch the entries that a shared word moves."""
    target = torch.tensor([8.0, 3, 1, 1, 1, 1, 1, 1, 1, 1]).log().expand(10, 10)
    return target, torch.tensor([6.0, 1, 1, 8, 8, 1, 1, 1, 1, 1]).log().expand(10, 10)


PAIRS = [opposed(), (chain(50, 2), near(chain(50, 2), 1)), (chain(20, 3), chain(20, 4))]


@pytest.mark.parametrize("pair", PAIRS, ids=["opposed", "near", "unrelated"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_emitted_token_has_the_targets_law(rule: Rule, pair: Pair) -> None:
    """Over 4,000 seeds. False alarms: 1e-4 each, six cases."""
    assert first_token_fit(rule(Sampler([])), *pair, draws=4_000) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=["opposed", "near", "unrelated"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_emitted_token_has_the_targets_law_over_many_seeds(
    rule: Rule, pair: Pair
) -> None:
    """100,000 seeds. False alarms: 1e-4 each, six cases."""
    assert first_token_fit(rule(Sampler([])), *pair, draws=100_000) > FALSE_ALARM


@pytest.mark.parametrize(
    ("role", "instead"),
    [(Role.RECOVER, Role.PROPOSE), (Role.ACCEPT, Role.PROPOSE), (Role.RECOVER, Role.ACCEPT)],
)
def test_a_random_number_used_twice_is_found(role: Role, instead: Role) -> None:
    """The same statistic, of a rule in which two roles share their stream."""
    rule = OptimalCoupling(Reuses(role, instead))
    assert first_token_fit(rule, *opposed(), draws=6_000) < FALSE_ALARM


def test_a_token_proposed_with_certainty_leaves_the_targets_law() -> None:
    """A lookup proposes without a law. False alarms: 1e-4."""
    target, draws = chain(10, seed=3), 6_000
    rows = [
        SamplerRow.after(scheduled([], sampling), drafted)
        for sampling in seeded(draws, SAMPLED)
        for drafted in [(), (4,)]
    ]
    logits = target[torch.tensor([0, 4] * draws)]
    emitted = OptimalCoupling(Sampler([])).verify(logits, rows, [(Proposal(4),)] * draws)
    law = sequence_law(target, SAMPLED, 1)
    assert fit(count(np.array([[e[0]] for e in emitted]), 10), law) > FALSE_ALARM
    assert {len(e) for e in emitted if e[0] == 4} == {2}


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_that_is_always_wrong_leaves_the_targets_law(rule: Rule) -> None:
    """The draft knows only tokens that the target never takes. False alarms: 1e-4."""
    target, draft = chain(8, seed=4), chain(8, seed=5)
    target[:, :4] = -200.0
    draft[:, 4:] = float("-inf")
    tokens = decode(rule(Sampler([])), target, draft, [2], 2, seeded(1_500, SAMPLED))
    assert fit(count(tokens, 8), sequence_law(target, SAMPLED, 2)) > FALSE_ALARM


def sequence_fits(
    rule: VerificationRule,
    draft_lengths: list[int],
    draws: int,
    row_of: Callable[[ScheduledSequence, tuple[int, ...]], SamplerRow] = SamplerRow.after,
) -> list[float]:
    """p-values: each position given its prefix, then the sequence as a whole."""
    target = chain(4, seed=6)
    samplings = seeded(draws, SAMPLED, first=10**6)
    tokens = decode(rule, target, near(target, seed=7), draft_lengths, 4, samplings, row_of)
    law = sequence_law(target, SAMPLED, 4)
    each = [
        conditional_fit(count(tokens[:, :n], 4), law.sum(axis=tuple(range(n, 4))))
        for n in range(1, 5)
    ]
    return [*each, fit(count(tokens, 4), law)]


@pytest.mark.parametrize("draft_lengths", [[0], [1], [4], [3, 0, 1, 4, 2]])
@pytest.mark.parametrize("rule", RULES)
def test_every_position_has_the_targets_law_given_its_prefix(
    rule: Rule, draft_lengths: list[int]
) -> None:
    """Rounds of one draft length, and of all in turn. False alarms: 5e-4 a case, the least of
    five p-values."""
    assert min(sequence_fits(rule(Sampler([])), draft_lengths, draws=1_000)) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("draft_lengths", [[0], [1], [2], [3], [4], [3, 0, 1, 4, 2]])
@pytest.mark.parametrize("rule", RULES)
def test_every_position_has_the_targets_law_over_many_seeds(
    rule: Rule, draft_lengths: list[int]
) -> None:
    """20,000 sequences a case. False alarms: 5e-4 a case, 12 cases."""
    assert min(sequence_fits(rule(Sampler([])), draft_lengths, draws=20_000)) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
def test_noise_shared_between_positions_is_found(rule: Rule) -> None:
    def same_position(sequence: ScheduledSequence, drafted: tuple[int, ...]) -> SamplerRow:
        return replace(SamplerRow.after(sequence, drafted), position=1)

    first, *later = sequence_fits(rule(Sampler([])), [2], 1_000, same_position)
    assert first > FALSE_ALARM  # one token alone shows nothing
    assert min(later) < FALSE_ALARM


def second_round_fit(
    row_of: Callable[[ScheduledSequence, tuple[int, ...]], SamplerRow],
) -> float:
    """A position drafted twice: the second time by a drafter that goes by its rejected draft.

    p-value of the second token where the first round ended at the first.
    """
    target = chain(6, seed=8)
    rule = OptimalCoupling(Sampler([]))
    samplings = seeded(2_000, SAMPLED)
    sequences = [scheduled([], sampling) for sampling in samplings]
    rounds = run_round(rule, target, chain(6, 9, 2.0), sequences, 2, row_of)
    again = [
        (scheduled(emitted, sampling), draft[1].token_id)
        for (draft, emitted), sampling in zip(rounds, samplings, strict=True)
        if len(emitted) == 1
    ]
    drafts = torch.zeros(len(again), 6, 6)
    drafts[torch.arange(len(again)), :, torch.tensor([token for _, token in again])] = 1.0
    seconds = run_round(rule, target, drafts, [s for s, _ in again], 1, row_of)
    tokens = np.array(
        [[s.token_ids[0], emitted[0]] for (s, _), (_, emitted) in zip(again, seconds, strict=True)]
    )
    law = torch.softmax(target.double(), dim=-1).numpy()
    return conditional_fit(count(tokens, 6), law)


def test_a_drafter_may_go_by_drafts_that_were_rejected() -> None:
    """`recycled` has seen the attention of rejected rows. False alarms: 1e-4."""
    assert second_round_fit(SamplerRow.after) > FALSE_ALARM


def test_proposals_that_repeat_their_noise_in_a_later_round_are_found() -> None:
    def no_step(sequence: ScheduledSequence, drafted: tuple[int, ...]) -> SamplerRow:
        return replace(SamplerRow.after(sequence, drafted), num_drafted=0)

    assert second_round_fit(no_step) < FALSE_ALARM
