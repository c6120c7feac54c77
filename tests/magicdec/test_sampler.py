"""What the sampler chooses follows its parameters, its seed and nothing of the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from magicdec.kernels.dispatch import select_gumbel_argmax
from magicdec.kernels.gumbel import gumbel_argmax
from magicdec.sampler import Sampler, SamplerRow
from magicdec.types import SamplingParams

VOCAB_SIZE = 50
EOS = 49
LOGITS = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2


def row(
    sampling: SamplingParams, position: int = 10, history: list[int] | None = None
) -> SamplerRow:
    tokens = None if history is None else np.array(history, dtype=np.int64)
    return SamplerRow(sampling, position, tokens, num_prompt_tokens=4)


def processed(sampling: SamplingParams, history: list[int] | None = None) -> torch.Tensor:
    return Sampler([EOS]).process(LOGITS, row(sampling, history=history))


def test_sampled_frequencies_follow_the_processed_probabilities() -> None:
    """Chi-square over 20,000 positions; one seed in 10,000 would fail, and this one is fixed."""
    sampling = SamplingParams(temperature=0.8, top_k=12, seed=5)
    sampler = Sampler([EOS])
    draws = 20_000
    rows = [row(sampling, position) for position in range(4, 4 + draws)]
    chosen = sampler.sample(LOGITS.expand(draws, -1), rows)
    counts = np.bincount(chosen, minlength=VOCAB_SIZE)
    expected = torch.softmax(processed(sampling), dim=0).double().numpy() * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert statistic < 37.4  # 0.9999 quantile of chi-square with 11 degrees of freedom


def test_a_seed_and_position_choose_the_same_token_in_any_batch() -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    sampler = Sampler([EOS])
    alone = [sampler.sample(LOGITS[None], [row(sampling, p)])[0] for p in range(20)]
    together = sampler.sample(LOGITS.expand(20, -1), [row(sampling, p) for p in range(20)])
    assert alone == together
    assert len(set(together)) > 2


def test_top_k_keeps_the_k_best() -> None:
    kept = torch.isfinite(processed(SamplingParams(top_k=7)))
    assert kept.sum() == 7
    assert LOGITS[kept].min() > LOGITS[~kept].max()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    kept = torch.isfinite(processed(SamplingParams(top_p=top_p)))
    probabilities = torch.softmax(LOGITS, dim=0)
    assert probabilities[kept].sum() >= top_p
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p


def test_a_nucleus_wider_than_the_candidates_is_still_found() -> None:
    flat = torch.linspace(0, 0.1, 5000)
    kept = Sampler([EOS]).process(flat, row(SamplingParams(top_p=0.9))).isfinite().sum()
    assert 4000 < kept < 4600


def test_min_p_removes_what_is_less_likely_than_its_share_of_the_best() -> None:
    kept = torch.isfinite(processed(SamplingParams(min_p=0.2)))
    probabilities = torch.softmax(LOGITS, dim=0)
    assert torch.equal(kept, probabilities >= 0.2 * probabilities.max())


def test_penalties_count_output_and_the_repetition_penalty_also_the_prompt() -> None:
    history = [1, 2, 2, 3, 4, 4, 5]  # four prompt tokens
    greedy = SamplingParams(temperature=0.0)
    frequency = processed(replace(greedy, frequency_penalty=0.5), history) - LOGITS
    presence = processed(replace(greedy, presence_penalty=0.5), history) - LOGITS
    repetition = processed(replace(greedy, repetition_penalty=2.0), history)
    assert frequency[4] == pytest.approx(-1.0)
    assert frequency[5] == presence[4] == presence[5] == pytest.approx(-0.5)
    assert frequency[[1, 2, 3]].abs().max() == presence[[1, 2, 3]].abs().max() == 0
    for token in (1, 2, 3, 4, 5):
        value = float(LOGITS[token])
        assert repetition[token] == pytest.approx(value / 2 if value > 0 else value * 2)


def test_min_tokens_forbids_the_end_until_then() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=7, stop_token_ids=(3,))
    early, late = row(sampling, position=10), row(sampling, position=11)
    sampler = Sampler([EOS])
    assert torch.isinf(sampler.process(LOGITS, early)[[3, EOS]]).all()
    assert torch.isfinite(sampler.process(LOGITS, late)).all()


def test_a_bias_moves_one_entry() -> None:
    biased = processed(SamplingParams(temperature=0.0, logit_bias=((9, 100.0),)))
    assert int(biased.argmax()) == 9
    assert Sampler([EOS]).sample(LOGITS[None], [row(SamplingParams(temperature=0.0))]) == [
        int(LOGITS.argmax())
    ]


def test_rows_of_every_kind_choose_beside_each_other_what_they_choose_alone() -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(temperature=0.6, seed=1),
        SamplingParams(temperature=1.4, seed=2),
        SamplingParams(temperature=0.9, top_p=0.5, seed=3),
        SamplingParams(temperature=1.0, top_k=3, min_p=0.1, seed=4),
        SamplingParams(temperature=1.0, logit_bias=((7, 4.0),), seed=5),
        SamplingParams(temperature=0.0, min_tokens=16),
    ]
    logits = torch.randn(len(kinds), VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    logits[-1, EOS] = 100.0
    rows = [row(sampling, history=[1, 2, 3, 4, 5, 6]) for sampling in kinds]
    for choose in (gumbel_argmax, select_gumbel_argmax(torch.device("cpu"))):
        sampler, before = Sampler([EOS], choose), logits.clone()
        alone = [sampler.sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
        assert sampler.sample(logits, rows) == alone
        assert alone[-1] != EOS
        assert torch.equal(logits, before)
