"""Toy chains driven through the real verification rules, and the statistics that judge them.

A chain is a table of logits, [vocab_size, vocab_size]: row i gives the token after token i. Seeds
are fixed, so a test either always passes or never; its false-alarm rate is the share of seeds
under which a right implementation would have failed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.batch import ScheduledSequence
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.verification import VerificationRule

FALSE_ALARM = 1e-4  # of one p-value; where a test takes the least of n, n times that is the bound
_LEAST_EXPECTED = 5.0  # cells expected less often are merged: below, chi-square is no law of theirs
PROMPT_TOKEN = 0

Counts = NDArray[np.float64]
RowOf = Callable[[ScheduledSequence, tuple[int, ...]], SamplerRow]
Round = tuple[tuple[Proposal, ...], tuple[int, ...]]
"""The draft, and the tokens emitted."""


def chain(vocab_size: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, vocab_size, generator=generator) * spread


def near(table: torch.Tensor, seed: int, spread: float = 0.7) -> torch.Tensor:
    """A draft for the chain: the same logits, disturbed."""
    return table + chain(len(table), seed, spread)


def seeded(count: int, sampling: SamplingParams, first: int = 0) -> list[SamplingParams]:
    """The same parameters under `count` seeds."""
    return [replace(sampling, seed=first + i) for i in range(count)]


def scheduled(token_ids: Sequence[int], sampling: SamplingParams) -> ScheduledSequence:
    """A decode row after one prompt token and what was emitted since."""
    history = np.array([PROMPT_TOKEN, *token_ids], dtype=np.int64)
    return ScheduledSequence(
        sequence_id=0,
        token_ids=history[-1:],
        num_computed_tokens=len(history) - 1,
        block_table=np.zeros(1, dtype=np.int64),
        sampling=sampling,
        num_prompt_tokens=1,
        history=history,
        draft=None,
    )


def run_round(
    rule: VerificationRule,
    target: torch.Tensor,  # [vocab_size, vocab_size]
    draft: torch.Tensor,  # the same, or one table a sequence
    sequences: Sequence[ScheduledSequence],
    draft_length: int,
    row_of: RowOf = SamplerRow.after,
) -> list[Round]:
    """One round of all sequences in one batch, as the runner does it."""
    tables = draft.expand(len(sequences), *target.shape)
    drafts: list[tuple[Proposal, ...]] = [() for _ in sequences]
    last = [int(s.token_ids[-1]) for s in sequences]
    for _ in range(draft_length):
        rows = [row_of(s, _ids(d)) for s, d in zip(sequences, drafts, strict=True)]
        chosen = rule.propose(tables[torch.arange(len(last)), torch.tensor(last)], rows)
        drafts = [(*d, proposal) for d, proposal in zip(drafts, chosen, strict=True)]
        last = [proposal.token_id for proposal in chosen]
    rows, inputs = [], []
    for sequence, proposals in zip(sequences, drafts, strict=True):
        rows += [row_of(sequence, _ids(proposals[:i])) for i in range(len(proposals) + 1)]
        inputs += [int(sequence.token_ids[-1]), *_ids(proposals)]
    emitted = rule.verify(target[torch.tensor(inputs)], rows, drafts)
    return list(zip(drafts, emitted, strict=True))


def _ids(draft: Iterable[Proposal]) -> tuple[int, ...]:
    return tuple(proposal.token_id for proposal in draft)


def decode(
    rule: VerificationRule,
    target: torch.Tensor,
    draft: torch.Tensor,
    draft_lengths: Sequence[int],  # of the rounds, in turn
    num_tokens: int,
    samplings: Sequence[SamplingParams],
    row_of: RowOf = SamplerRow.after,
) -> NDArray[np.int64]:
    """The first num_tokens of every sequence: [num_sequences, num_tokens]."""
    tokens: list[tuple[int, ...]] = [() for _ in samplings]
    for i in range(num_tokens):
        live = [n for n, t in enumerate(tokens) if len(t) < num_tokens]
        if not live:
            break
        sequences = [scheduled(tokens[n], samplings[n]) for n in live]
        length = draft_lengths[i % len(draft_lengths)]
        rounds = run_round(rule, target, draft, sequences, length, row_of)
        for n, (_, emitted) in zip(live, rounds, strict=True):
            tokens[n] += emitted
    return np.array([t[:num_tokens] for t in tokens])


def sequence_law(
    target: torch.Tensor, sampling: SamplingParams, num_tokens: int, eos: Iterable[int] = ()
) -> NDArray[np.float64]:
    """The chain's own law of num_tokens tokens, every prefix processed: [vocab_size] * num_tokens.

    What plain decoding samples from, by enumeration.
    """
    vocab_size = len(target)
    sampler, law = Sampler(eos), np.ones(())
    for length in range(num_tokens):
        step = [
            torch.softmax(
                sampler.process(
                    target[prefix[-1] if prefix else PROMPT_TOKEN],
                    SamplerRow.after(scheduled(prefix, sampling), ()),
                ).double(),
                dim=-1,
            ).numpy()
            for prefix in product(range(vocab_size), repeat=length)
        ]
        law = law[..., None] * np.stack(step).reshape((vocab_size,) * (length + 1))
    return law


def count(tokens: NDArray[np.int64], vocab_size: int) -> Counts:
    """[num_draws, num_tokens] -> how often each sequence came, [vocab_size] * num_tokens."""
    shape = (vocab_size,) * tokens.shape[1]
    cells = np.ravel_multi_index(tuple(tokens.T), shape)
    return np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)


def tail_probability(statistic: float, degrees: float) -> float:
    """Of a chi-square variable beyond `statistic`."""
    if degrees == 0:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def fit(counts: Counts, law: NDArray[np.float64]) -> float:
    """p-value of Pearson's test that the counts come from the law; 0 where p = 0 was drawn."""
    return tail_probability(*_pearson(counts.ravel(), law.ravel()))


def conditional_fit(counts: Counts, law: NDArray[np.float64]) -> float:
    """p-value that the last token, given each prefix that was drawn, comes from the law's."""
    vocab_size = law.shape[-1]
    total, degrees = 0.0, 0.0
    for drawn, joint in zip(
        counts.reshape(-1, vocab_size), law.reshape(-1, vocab_size), strict=True
    ):
        if drawn.sum() > 0:
            statistic, free = _pearson(drawn, joint)
            total, degrees = total + statistic, degrees + free
    return tail_probability(total, degrees)


def homogeneity(a: Counts, b: Counts) -> float:
    """p-value that two sets of counts come from one law."""
    a, b = a.ravel(), b.ravel()
    share = a.sum() / (a.sum() + b.sum())
    groups = _merged(min(share, 1 - share) * (a + b))
    total, degrees = 0.0, -1.0
    for cells in groups:
        both = a[cells].sum() + b[cells].sum()
        total += (a[cells].sum() - share * both) ** 2 / (both * share * (1 - share))
        degrees += 1
    return tail_probability(total, degrees)


def _pearson(counts: Counts, law: NDArray[np.float64]) -> tuple[float, float]:
    """The statistic and its degrees of freedom; the law need not be normalised."""
    if counts[law == 0].sum() > 0:
        return float("inf"), 1.0
    expected = law * (counts.sum() / law.sum())
    sums = [(counts[cells].sum(), expected[cells].sum()) for cells in _merged(expected)]
    return sum((n - e) ** 2 / e for n, e in sums), len(sums) - 1


def _merged(expected: Counts) -> list[NDArray[np.int64]]:
    """Cells alone where enough is expected, the others together (with a cell more if need be)."""
    order = np.argsort(expected, kind="stable")
    order = order[expected[order] > 0]
    num_rare = int((expected[order] < _LEAST_EXPECTED).sum())
    rare = order[:num_rare]
    while 0 < len(rare) < len(order) and expected[rare].sum() < _LEAST_EXPECTED:
        rare = order[: len(rare) + 1]
    rest = [order[i : i + 1] for i in range(len(rare), len(order))]
    return [rare, *rest] if len(rare) > 0 else rest
