"""Penalties, bias, masks and min_tokens shape both rules' law as they shape plain decoding's.

The law is the enumeration of every prefix, each processed with its own history.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from magicdec.batch import ScheduledSequence
from magicdec.sampler import Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import OptimalCoupling, SharedNoise, VerificationRule
from magicdec.vocabulary import Vocabulary
from tests.distributions import (
    FALSE_ALARM,
    RowOf,
    chain,
    conditional_fit,
    count,
    decode,
    fit,
    near,
    seeded,
    sequence_law,
)

VOCAB_SIZE = 5
EOS = 4
NUM_TOKENS = 3
TARGET = chain(VOCAB_SIZE, seed=20, spread=1.0)
DRAFT = near(TARGET, seed=21)
PENALIZED = SamplingParams(frequency_penalty=1.5, presence_penalty=0.5)
SAMPLINGS = {
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=2),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.4),
    "output penalties": PENALIZED,
    "repetition penalty": SamplingParams(repetition_penalty=10.0),
    "bias": SamplingParams(logit_bias=((1, 1.5), (3, -1.0))),
    "bad token": SamplingParams(logit_bias=((0, -100.0), (2, -100.0))),
    "min_tokens": SamplingParams(min_tokens=2),
    "all": replace(PENALIZED, temperature=0.8, top_k=4, top_p=0.95, logit_bias=((2, -100.0),)),
}
RULES = [SharedNoise, OptimalCoupling]
Rule = Callable[[Sampler], VerificationRule]


def p_values(
    rule: Rule, sampling: SamplingParams, draws: int, row_of: RowOf = SamplerRow.after
) -> tuple[float, float]:
    """Of the sequences, and of their last token given the others."""
    drawn = decode(
        rule(Sampler([EOS])), TARGET, DRAFT, [2, 1], NUM_TOKENS, seeded(draws, sampling), row_of
    )
    law = sequence_law(TARGET, sampling, NUM_TOKENS, [EOS])
    counts = count(drawn, VOCAB_SIZE)
    return fit(counts, law), conditional_fit(counts, law)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
def test_processed_sequences_have_the_targets_law(rule: Rule, name: str) -> None:
    """500 sequences a case; a sequence of probability 0 counts as p = 0.

    False alarms: 2e-4 a case, the lesser of two p-values; 20 cases.
    """
    assert min(p_values(rule, SAMPLINGS[name], draws=500)) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
def test_processed_sequences_have_the_targets_law_over_many_seeds(rule: Rule, name: str) -> None:
    """10,000 sequences a case. False alarms: 2e-4 a case, 20 cases."""
    assert min(p_values(rule, SAMPLINGS[name], draws=10_000)) > FALSE_ALARM


@pytest.mark.parametrize("name", ["output penalties", "repetition penalty"])
@pytest.mark.parametrize("rule", RULES)
def test_a_penalty_that_ignores_drafted_tokens_is_found(rule: Rule, name: str) -> None:
    def blind(sequence: ScheduledSequence, drafted: tuple[int, ...]) -> SamplerRow:
        return replace(SamplerRow.after(sequence, drafted), history=sequence.history)

    assert min(p_values(rule, SAMPLINGS[name], 1_000, blind)) < FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
def test_min_tokens_that_counts_no_drafted_token_is_found(rule: Rule) -> None:
    def blind(sequence: ScheduledSequence, drafted: tuple[int, ...]) -> SamplerRow:
        row = SamplerRow.after(sequence, drafted)
        return replace(row, num_prompt_tokens=row.num_prompt_tokens + len(drafted))

    assert min(p_values(rule, SAMPLINGS["min_tokens"], 1_000, blind)) < FALSE_ALARM


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_of_the_drafts_scores_alone_is_found(rule: Rule) -> None:
    """The statistic sees a target that forgets its processors."""

    class Unmasked(Sampler):
        def process_rows(
            self, scores: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary
        ) -> torch.Tensor:
            rows = [replace(row, sampling=replace(row.sampling, top_k=0)) for row in rows]
            return super().process_rows(scores, rows, vocabulary)

    drawn = decode(
        rule(Unmasked([EOS])), TARGET, DRAFT, [2], 2, seeded(300, SamplingParams(top_k=2))
    )
    law = sequence_law(TARGET, SamplingParams(top_k=2), 2)
    assert fit(count(drawn, VOCAB_SIZE), law) == 0.0
