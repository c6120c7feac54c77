"""Ranks that share a vocabulary choose together what one rank with all of it would choose."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.kernels.dispatch import select_gumbel_argmax
from magicdec.kernels.gumbel import GumbelArgmax, gumbel_argmax
from magicdec.sampler import Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import OptimalCoupling, SharedNoise, verification_rule
from magicdec.vocabulary import Vocabulary, even_bounds
from tests.ranks import ThreadRanks

KERNELS = [gumbel_argmax, select_gumbel_argmax(torch.device("cpu"))]
EOS = 3
PLAIN = SamplingParams(temperature=1.0, seed=11)


def row(sampling: SamplingParams, history: list[int]) -> SamplerRow:
    """Two prompt tokens, then output."""
    return SamplerRow(sampling, len(history), np.array(history, dtype=np.int64), 2)


def part_of(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    return logits[:, vocabulary.start : vocabulary.stop]


@st.composite
def bounds_of(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """One to four ranks, even shares or any."""
    num_blocks = -(-size // 8)
    if draw(st.booleans()):
        return even_bounds(size, draw(st.integers(1, min(4, num_blocks))))
    cuts = st.sets(st.integers(1, max(num_blocks - 1, 1)), max_size=3 if num_blocks > 1 else 0)
    return (0, *(8 * cut for cut in sorted(draw(cuts))), size)


@st.composite
def logits_of(draw: st.DrawFn, num_rows: int, size: int) -> torch.Tensor:
    """Few distinct values or many, flat or steep; some removed, one of each row never."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = torch.randn(num_rows, size, generator=generator) * draw(
        st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0])
    )
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        hidden = torch.rand(logits.shape, generator=generator) < draw(st.floats(0.0, 0.99))
        hidden[torch.arange(num_rows), torch.randint(size, (num_rows,), generator=generator)] = 0
        logits[hidden] = -math.inf
    return logits + draw(st.sampled_from([0.0, -1000.0, 20.0]))


@st.composite
def samplings_of(draw: st.DrawFn, size: int) -> SamplingParams:
    ids = st.integers(0, size - 1)
    often_off = st.sampled_from([0.0, 0.0, 0.0, 0.7, -1.5])
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 7, 255, 256, 257, 700, 10_000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.02])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)),
        presence_penalty=draw(often_off),
        frequency_penalty=draw(often_off),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.8, 0.5])),
        logit_bias=tuple(draw(st.lists(st.tuples(ids, st.floats(-5, 5)), max_size=3))),
        min_tokens=draw(st.sampled_from([0, 0, 16])),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=2))),
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.sampled_from([12, 30, 250, 257, 520, 1100, 1700]))
def test_any_shares_of_any_rows_give_the_whole_vocabularys_tokens(
    data: st.DataObject, size: int
) -> None:
    """-inf, ties, nuclei and top-k beyond what ranks send, shares unlike in size: all of them."""
    rows = [
        row(sampling, data.draw(st.lists(st.integers(0, size - 1), min_size=4, max_size=12)))
        for sampling in data.draw(st.lists(samplings_of(size), min_size=1, max_size=4))
    ]
    logits = data.draw(logits_of(len(rows), size))
    ranks = ThreadRanks(data.draw(bounds_of(size)))
    sampler = Sampler([EOS], data.draw(st.sampled_from(KERNELS)))
    try:
        expected = sampler.sample(logits, rows)
    except ValueError:  # bans may have left nothing
        with pytest.raises(ValueError, match="nothing above -inf"):
            ranks.run(lambda v: sampler.sample(part_of(logits, v), rows, v))
        return
    chosen = ranks.run(lambda v: sampler.sample(part_of(logits, v), rows, v))
    assert chosen == [expected] * len(chosen)
    assert ranks.num_exchanges <= 4


@pytest.mark.parametrize(
    ("sampling", "spread", "num_exchanges"),
    [
        (SamplingParams(temperature=0.0), 1.0, 1),
        (PLAIN, 1.0, 2),
        (replace(PLAIN, min_p=0.1), 1.0, 2),
        (replace(PLAIN, top_k=256), 0.01, 3),
        (replace(PLAIN, top_p=0.9), 8.0, 3),
        (replace(PLAIN, top_k=50, top_p=0.9), 0.01, 3),
        (replace(PLAIN, top_p=0.9), 0.01, 4),
        (replace(PLAIN, top_k=1200), 0.01, 4),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 20])
def test_a_step_exchanges_a_fixed_number_of_times_whatever_its_rows(
    sampling: SamplingParams, spread: float, num_exchanges: int, num_rows: int
) -> None:
    """Whole rows are sent, the fourth time, only where the best of each rank do not settle them."""
    logits = torch.randn(num_rows, 3000, generator=torch.Generator().manual_seed(0)) * spread
    rows = [row(replace(sampling, seed=i), [1, 2, 3, 4]) for i in range(num_rows)]
    sampler = Sampler([EOS])
    ranks = ThreadRanks(even_bounds(3000, 2))
    chosen = ranks.run(lambda v: sampler.sample(part_of(logits, v), rows, v))
    assert chosen == [sampler.sample(logits, rows)] * 2
    assert ranks.num_exchanges == num_exchanges


def test_candidates_that_leave_out_ties_do_not_settle_a_nucleus() -> None:
    """600 entries as good as the best, all on one rank, and top-k takes them all in: which share
    of their mass is 0.9 cannot be told from 256 of them."""
    logits = torch.full((1, 1600), -5.0)
    logits[0, 8:608] = 0.0
    rows = [row(replace(PLAIN, top_k=200, top_p=0.9), [1, 2, 3, 4])]
    sampler = Sampler([EOS])
    ranks = ThreadRanks(even_bounds(1600, 2))
    chosen = ranks.run(lambda v: sampler.sample(part_of(logits, v), rows, v))
    assert chosen == [sampler.sample(logits, rows)] * 2
    assert ranks.num_exchanges == 4


@pytest.mark.parametrize("choose", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "sampling", [PLAIN, replace(PLAIN, top_p=0.5), replace(PLAIN, temperature=0.0)]
)
def test_a_row_that_orders_nothing_is_refused_by_every_rank(
    sampling: SamplingParams, bad: float, choose: GumbelArgmax
) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 3 if math.isnan(bad) else slice(None)] = bad
    rows = [row(sampling, [1, 2, 3])] * 2
    sampler = Sampler([EOS], choose)

    def refusal(vocabulary: Vocabulary) -> str:
        with pytest.raises(ValueError) as caught:
            sampler.sample(part_of(logits, vocabulary), rows, vocabulary)
        return str(caught.value)

    said = ThreadRanks((0, 16, 40)).run(refusal)
    assert said == ["row 1 of the scores holds a NaN, or nothing above -inf"] * 2


def test_a_share_that_is_removed_whole_leaves_the_others_to_choose() -> None:
    logits = torch.zeros(1, 48)
    logits[:, 16:32] = -math.inf
    rows = [row(replace(PLAIN, top_p=0.7), [1, 2, 3])]
    sampler = Sampler([EOS])
    chosen = ThreadRanks((0, 16, 32, 48)).run(lambda v: sampler.sample(part_of(logits, v), rows, v))
    assert chosen == [sampler.sample(logits, rows)] * 3


@pytest.mark.parametrize("name", ["shared_gumbel", "optimal_coupling"])
def test_a_rule_drafts_and_judges_alike_on_every_rank(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    target, draft = torch.randn(2, 3, 100, generator=generator) * 2
    rows = [row(replace(PLAIN, top_p=0.9, seed=8), [1, 2, *range(9, 9 + i)]) for i in range(3)]

    def round_of(vocabulary: Vocabulary | None) -> list[object]:
        rule = verification_rule(name, Sampler([EOS]), vocabulary)
        held = [part_of(t, vocabulary) if vocabulary else t for t in (target, draft)]
        proposals = rule.propose(held[1][:2], rows[:2])
        emitted = rule.verify(held[0], rows, [tuple(proposals)])
        return [emitted, [p.token_id for p in proposals]]

    assert isinstance(verification_rule(name, Sampler([])), SharedNoise | OptimalCoupling)
    assert ThreadRanks(even_bounds(100, 3)).run(round_of) == [round_of(None)] * 3


@given(size=st.integers(1, 5000), num_ranks=st.integers(1, 9))
def test_even_bounds_cut_no_block_and_differ_by_one_at_most(size: int, num_ranks: int) -> None:
    if size <= 8 * (num_ranks - 1):
        with pytest.raises(ValueError, match=f"a vocabulary of {size} entries does not go round"):
            even_bounds(size, num_ranks)
        return
    vocabulary = Vocabulary(even_bounds(size, num_ranks))
    assert vocabulary.size == sum(vocabulary.shares) == size
    assert min(vocabulary.shares) > 0
    assert all(bound % 8 == 0 for bound in vocabulary.bounds[:-1])
    blocks = [-(-share // 8) for share in vocabulary.shares]
    assert max(blocks) - min(blocks) <= 1
