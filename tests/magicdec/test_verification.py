"""What a rule accepts and puts in place of what it does not, apart from laws of large numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magicdec.config import VERIFICATION_RULES
from magicdec.kernels.gumbel import Role
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import (
    OptimalCoupling,
    SharedNoise,
    VerificationRule,
    accept,
    probabilities,
    residual,
    verification_rule,
)
from tests.distributions import chain, near, run_round, scheduled, seeded

TARGET = chain(12, seed=1)
SAMPLED = SamplingParams(max_tokens=64)
GREEDY = SamplingParams(temperature=0.0)
RULES = [SharedNoise, OptimalCoupling]
Rule = Callable[[Sampler], VerificationRule]


@given(
    draft=st.lists(st.integers(0, 3), max_size=6), target=st.lists(st.integers(0, 3), max_size=7)
)
def test_accept_emits_the_common_prefix_and_one_token(draft: list[int], target: list[int]) -> None:
    if len(target) != len(draft) + 1:
        with pytest.raises(ValueError, match=f"{len(draft)} drafts need {len(draft) + 1}"):
            accept(draft, target)
        return
    emitted = accept(draft, target)
    assert list(emitted) == target[: len(emitted)]
    assert list(emitted[:-1]) == draft[: len(emitted) - 1]
    assert len(emitted) == len(target) or emitted[-1] != draft[len(emitted) - 1]


def test_every_name_in_the_settings_is_a_rule() -> None:
    rules = {name: type(verification_rule(name, Sampler([]))) for name in VERIFICATION_RULES}
    assert rules == {"shared_gumbel": SharedNoise, "optimal_coupling": OptimalCoupling}


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_by_the_target_itself_is_accepted_whole(rule: Rule) -> None:
    sampling = replace(SAMPLED, temperature=0.7, top_p=0.9, frequency_penalty=0.5)
    sequences = [scheduled([3, 3], s) for s in seeded(300, sampling)]
    for draft, emitted in run_round(rule(Sampler([])), TARGET, TARGET, sequences, 4):
        assert emitted[:4] == tuple(p.token_id for p in draft)
        assert len(emitted) == 5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_temperature_zero_is_equality_with_the_argmax(rule: Rule, penalty: float) -> None:
    sampling = replace(GREEDY, frequency_penalty=penalty)
    draft_table = near(TARGET, seed=2)
    for start in range(12):
        sequence = scheduled([start], sampling)
        ((_, plain),) = run_round(rule(Sampler([])), TARGET, TARGET, [sequence], 3)
        ((draft, emitted),) = run_round(rule(Sampler([])), TARGET, draft_table, [sequence], 3)
        wrong = [p.token_id for p in draft] != list(plain[:3])
        assert emitted == plain[: len(emitted)]
        assert (len(emitted) < 4) == wrong
        assert all(p.scores is None for p in draft)


class Silent(Sampler):
    """Has no random number to give."""

    def choose(self, *_: object) -> int:
        raise AssertionError("drew a token")

    def uniform(self, *_: object) -> float:
        raise AssertionError("drew a number")


@pytest.mark.parametrize("rule", RULES)
def test_temperature_zero_draws_nothing(rule: Rule) -> None:
    sequences = [scheduled([1], GREEDY), scheduled([2], replace(GREEDY, presence_penalty=1.0))]
    run_round(rule(Silent([])), TARGET, near(TARGET, seed=2), sequences, 3)


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_draws_the_same_in_any_batch(rule: Rule) -> None:
    """Its own numbers only, drafted or not: others that draft take nothing from it."""
    built, table = rule(Sampler([])), near(TARGET, seed=3)
    mixed = [SAMPLED, GREEDY, replace(SAMPLED, seed=9, top_k=3), replace(SAMPLED, seed=8)]
    sequences = [scheduled([i], sampling) for i, sampling in enumerate(mixed)]
    for length in (0, 1, 3):
        together = run_round(built, TARGET, table, sequences, length)
        alone = [run_round(built, TARGET, table, [s], length)[0] for s in sequences]
        assert [emitted for _, emitted in together] == [emitted for _, emitted in alone]
    drafted = run_round(built, TARGET, table, sequences[:2], 3)
    rows = [SamplerRow.after(sequences[2], ())]
    (plain,) = built.verify(TARGET[[2]], rows, [()])
    assert len(drafted) == 2
    assert (plain,) == tuple(e for _, e in run_round(built, TARGET, table, sequences[2:3], 0))


def test_a_round_draws_one_uniform_a_judged_draft_and_one_token() -> None:
    """Keyed by role and absolute position; nothing of a position after the first rejection."""
    drawn: list[tuple[Role, int]] = []

    class Recorded(Sampler):
        def choose(self, scores: NDArray[np.floating[Any]], row: SamplerRow, role: Role) -> int:
            drawn.append((role, row.position))
            return super().choose(scores, row, role)

        def uniform(self, row: SamplerRow, role: Role) -> float:
            drawn.append((role, row.position))
            return super().uniform(row, role)

    for sampling in seeded(50, SAMPLED):
        drawn.clear()
        sequence = scheduled([4, 5], sampling)  # three tokens: the next position is 3
        table = near(TARGET, seed=4)
        ((_, emitted),) = run_round(OptimalCoupling(Recorded([])), TARGET, table, [sequence], 3)
        judged = min(len(emitted), 3)
        proposed = [(Role.PROPOSE, 3 + i) for i in range(3)]
        accepted = [(Role.ACCEPT, 3 + i) for i in range(judged)]
        assert drawn == [*proposed, *accepted, (Role.RECOVER, 2 + len(emitted))]


@settings(max_examples=300, deadline=None)
@given(
    target=st.lists(st.none() | st.floats(-30, 30, width=32), min_size=2, max_size=12),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_a_token_that_the_target_cannot_take_is_never_emitted(
    target: list[float | None], seed: int, data: st.DataObject
) -> None:
    """None stands for -inf. The draft may hold any law, or none."""
    p = torch.tensor([float("-inf") if x is None else x for x in target])
    if p.isinf().all():
        p[0] = 0.0
    token = data.draw(st.integers(0, len(p) - 1))
    q = torch.tensor(
        data.draw(
            st.lists(
                st.sampled_from([float("-inf"), -40.0, 0.0, 3.0]),
                min_size=len(p),
                max_size=len(p),
            )
        )
    )
    q[token] = 0.0
    scores = q if data.draw(st.booleans()) else None
    sequence = scheduled([], replace(SAMPLED, seed=seed))
    rows = [SamplerRow.after(sequence, ()), SamplerRow.after(sequence, (token,))]
    rule = OptimalCoupling(Sampler([]))
    (emitted,) = rule.verify(torch.stack([p, p]), rows, [(Proposal(token, scores),)])
    assert all(p[t] > float("-inf") for t in emitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_normalised_and_masked_entries_exactly_zero(dtype: torch.dtype) -> None:
    scores = torch.tensor([1e4, 1e4 - 3, float("-inf"), -1e4], dtype=dtype).float()
    p = probabilities(scores)
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1.0, abs=1e-15)
    assert p[2] == 0.0


def test_the_residual_takes_what_the_target_holds_beyond_the_draft() -> None:
    p, q = np.array([0.5, 0.2, 0.3]), np.array([0.0, 0.6, 0.4])
    np.testing.assert_allclose(residual(p, q), [0.5, 0.0, 0.0])


def test_an_empty_residual_is_the_targets_law() -> None:
    """p a last bit under q everywhere: what rounding of two sums may leave."""
    q = np.array([0.5, 0.25, 0.25])
    p = np.nextafter(q, 0.0)
    np.testing.assert_array_equal(residual(p, q), p)
    np.testing.assert_array_equal(residual(q, q), q)
