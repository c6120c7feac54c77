"""Seeded sampling: processed scores plus counter-based Gumbel noise, then argmax.

One path for greedy and sampled rows, and for draft and target: the choice at an absolute position
depends on the logits, the request's parameters and its seed, and on nothing of the batch.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.batch import ScheduledSequence
from magicdec.kernels.gumbel import (
    Draw,
    GumbelArgmax,
    Role,
    Scaling,
    Winners,
    gumbel_argmax,
    perturbed_argmax,
    uniforms,
)
from magicdec.kernels.transfer import send
from magicdec.truncation import removes, truncate
from magicdec.types import SamplingParams
from magicdec.vocabulary import Vocabulary


@dataclass(slots=True)  # made for every row of every step: frozen, it takes three times as long
class SamplerRow:
    """One token to choose: the one at absolute position `position`."""

    sampling: SamplingParams
    position: int
    history: NDArray[np.int64] | None  # all tokens before it, where penalties need them
    num_prompt_tokens: int
    num_drafted: int = 0  # of the tokens before it, this round's drafts

    @classmethod
    def after(cls, sequence: ScheduledSequence, drafted: tuple[int, ...]) -> "SamplerRow":
        """The choice that follows the sequence's tokens and `drafted`, for draft and verify."""
        assert sequence.sampling is not None
        history = sequence.history if sequence.sampling.has_penalties else None
        if history is not None and drafted:
            history = np.concatenate([history, np.array(drafted, dtype=history.dtype)])
        position = sequence.num_tokens + len(drafted)
        prompt = sequence.num_prompt_tokens
        return cls(sequence.sampling, position, history, prompt, num_drafted=len(drafted))

    @classmethod
    def each_after(
        cls, sequence: ScheduledSequence, num_drafted: int, drafted: Callable[[], Sequence[int]]
    ) -> "list[SamplerRow]":
        """after() none of the drafted tokens, one of them, and so on to all of them. They are asked
        for where penalties look at them alone: they may still be on the device."""
        assert sequence.sampling is not None
        if sequence.sampling.has_penalties:
            token_ids = tuple(drafted())
            return [cls.after(sequence, token_ids[:n]) for n in range(num_drafted + 1)]
        own, position, prompt = sequence.sampling, sequence.num_tokens, sequence.num_prompt_tokens
        return [cls(own, position + n, None, prompt, n) for n in range(num_drafted + 1)]

    @property
    def num_output_tokens(self) -> int:
        """Chosen before this one, drafts included."""
        return self.position - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Proposal:
    """One drafted token and the law it was drawn from: processed scores, fp32 [vocab_size].

    None where no rule needs the law: under shared noise, and for a token proposed with certainty.
    """

    token_id: int
    scores: torch.Tensor | None = None


class Sampler:
    """Chooses tokens for rows of logits; holds no state between calls."""

    def __init__(
        self, eos_token_ids: Iterable[int], gumbel_argmax: GumbelArgmax = gumbel_argmax
    ) -> None:
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._gumbel_argmax = gumbel_argmax

    def sample(
        self, logits: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary | None = None
    ) -> list[int]:
        """logits: [num_rows, this rank's share], any float dtype; None: the whole vocabulary.

        Returns one token id a row, the same on every rank and however the vocabulary is shared.
        Raises ValueError for a row that holds a NaN, on every rank.
        """
        return self.winners(logits, rows, vocabulary).token_ids()

    def winners(
        self, logits: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary | None = None
    ) -> Winners:
        """sample() as the device has it."""
        vocabulary = vocabulary or Vocabulary.whole(logits.shape[1])
        draws, scaling = [shared_draw(row) for row in rows], None
        if all(map(self.only_scales, rows)):
            scaling = _scaling(logits, rows, vocabulary)
        else:
            logits = self.process_rows(logits.float(), rows, vocabulary)
        return vocabulary.best(self._gumbel_argmax(logits, draws, vocabulary.start, scaling))

    def process(self, scores: torch.Tensor, row: SamplerRow) -> torch.Tensor:
        """Penalties, bias, min_tokens, temperature, top-k, top-p, min-p; removed entries are -inf.

        scores: fp32 [vocab_size], not changed. Returns fp32 log-probabilities up to a constant.
        """
        return self.process_rows(scores[None], [row], Vocabulary.whole(len(scores)))[0]

    def process_rows(
        self, scores: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary
    ) -> torch.Tensor:
        """process() of every row, [num_rows, this rank's share], on all ranks together."""
        scores = self._adjusted(scores, rows, vocabulary)
        scaling = _scaling(scores, rows, vocabulary)
        scores = scores if scaling is None else scaling.of(scores)
        if not any(removes(sampling, vocabulary.size) for sampling in _distinct(rows)):
            return scores
        cut = [i for i, row in enumerate(rows) if removes(row.sampling, vocabulary.size)]
        if len(cut) == len(rows):
            return truncate(scores, [row.sampling for row in rows], vocabulary)
        index = torch.tensor(cut, device=scores.device)
        samplings = [rows[i].sampling for i in cut]
        scores[index] = truncate(scores[index], samplings, vocabulary)
        return scores

    def _adjusted(
        self, scores: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary
    ) -> torch.Tensor:
        """With penalties, biases and bans, in a copy where there are any."""
        if not any(map(_may_adjust, _distinct(rows))) or all(map(self._keeps_logits, rows)):
            return scores
        scores = scores.clone()
        for own, row in zip(scores, rows, strict=True):
            sampling = row.sampling
            if sampling.has_penalties:
                _penalize(own, row, vocabulary)
            if sampling.logit_bias:
                _bias(own, sampling, vocabulary)
            if row.num_output_tokens < sampling.min_tokens:
                banned = sampling.stop_token_ids
                if not sampling.ignore_eos:
                    banned += self._eos_token_ids
                own[[i - vocabulary.start for i in banned if i in vocabulary]] = -math.inf
        return scores

    def only_scales(self, row: SamplerRow) -> bool:
        """Whether score over temperature, and noise, choose this token and the row's later ones."""
        sampling = row.sampling
        keeps_all = sampling.top_k <= 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0
        return self._keeps_logits(row) and (sampling.temperature == 0.0 or keeps_all)

    def _keeps_logits(self, row: SamplerRow) -> bool:
        sampling = row.sampling
        return (
            not sampling.has_penalties
            and not sampling.logit_bias
            and row.num_output_tokens >= sampling.min_tokens
        )

    def choose(self, scores: NDArray[np.floating[Any]], row: SamplerRow, role: Role) -> int:
        """One draw from the law exp(scores), [vocab_size], up to a constant; never an entry at
        -inf. The draw is a function of the row's seed and position, and of the role."""
        return perturbed_argmax(scores, _draw(row, role))

    def uniform(self, row: SamplerRow, role: Role) -> float:
        """The row's number in (0, 1) of a role that asks for one."""
        return float(uniforms(_draw(row, role).words(1))[0])


def _distinct(rows: list[SamplerRow]) -> Collection[SamplingParams]:
    """The rows' parameters, those of one sequence's rows once."""
    return {id(row.sampling): row.sampling for row in rows}.values()


def _may_adjust(sampling: SamplingParams) -> bool:
    """Whether logits of some row with these parameters are not taken as they are."""
    return sampling.has_penalties or bool(sampling.logit_bias) or sampling.min_tokens > 0


def shared_draw(row: SamplerRow) -> Draw | None:
    """The noise that draft and target share at the row's position; None: greedy."""
    sampling = row.sampling
    return None if sampling.temperature == 0.0 else Draw(sampling.seed, row.position, Role.SHARED)


def _draw(row: SamplerRow, role: Role) -> Draw:
    """Proposals alone come from a new stream each round: a position may be drafted again after a
    rejection, by a drafter that has seen what its first draft there led to. Every other role
    draws once a position, or wants the same draw again."""
    step = row.num_drafted if role is Role.PROPOSE else 0
    return Draw(row.sampling.seed, row.position, role, step)


def _scaling(
    logits: torch.Tensor, rows: list[SamplerRow], vocabulary: Vocabulary
) -> Scaling | None:
    """By the rows' temperatures, where they have one."""
    temperatures = [row.sampling.temperature for row in rows]
    if not any(temperatures):
        return None
    greatest = vocabulary.greatest(logits.amax(dim=1).float())
    return Scaling(greatest, send(torch.tensor(temperatures, dtype=torch.float32), logits.device))


def _penalize(scores: torch.Tensor, row: SamplerRow, vocabulary: Vocabulary) -> None:
    """The repetition penalty sees prompt and output (CTRL, arXiv 1909.05858), the others output."""
    assert row.history is not None
    sampling = row.sampling
    seen = np.unique(row.history)
    ids = torch.from_numpy(seen[vocabulary.holds(seen)] - vocabulary.start).to(scores.device)
    if sampling.repetition_penalty != 1.0:
        values = scores[ids]
        penalty = sampling.repetition_penalty
        scores[ids] = torch.where(values > 0, values / penalty, values * penalty)
    output, counts = np.unique(row.history[row.num_prompt_tokens :], return_counts=True)
    held = vocabulary.holds(output)
    if held.any():
        ids = torch.from_numpy(output[held] - vocabulary.start).to(scores.device)
        counted = torch.from_numpy(counts[held]).to(scores.device)
        scores[ids] -= sampling.frequency_penalty * counted.float()
        scores[ids] -= sampling.presence_penalty


def _bias(scores: torch.Tensor, sampling: SamplingParams, vocabulary: Vocabulary) -> None:
    ids, biases = (np.array(column) for column in zip(*sampling.logit_bias, strict=True))
    held = vocabulary.holds(ids)
    index = torch.from_numpy(ids[held] - vocabulary.start).to(scores.device)
    scores.index_add_(0, index, torch.from_numpy(biases[held]).to(scores))
