"""Seeded sampling: processed scores plus counter-based Gumbel noise, then argmax.

One path for greedy and sampled rows, and for draft and target: the choice at an absolute position
depends on the logits, the request's parameters and its seed, and on nothing of the batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.batch import ScheduledSequence
from magicdec.kernels.gumbel import Draw, Role, gumbel_argmax, perturbed_argmax, uniforms
from magicdec.types import SamplingParams

GumbelArgmax = Callable[[torch.Tensor, Sequence[Draw | None]], list[int]]

_NUCLEUS_CANDIDATES = 1024  # a nucleus is looked for among these before the whole vocabulary


@dataclass(frozen=True, slots=True)
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
        history = sequence.history
        if history is not None and drafted:
            history = np.concatenate([history, np.array(drafted, dtype=history.dtype)])
        position = sequence.num_tokens + len(drafted)
        prompt = sequence.num_prompt_tokens
        return cls(sequence.sampling, position, history, prompt, num_drafted=len(drafted))

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

    def sample(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[int]:
        """logits: [num_rows, vocab_size], any float dtype. Returns one token id a row.

        Raises ValueError for a row that holds a NaN.
        """
        draws = [shared_draw(row) for row in rows]
        if not all(self._is_plain_argmax(row) for row in rows):
            logits = self._process_all(logits.float(), rows)
        return self._gumbel_argmax(logits, draws)

    def _process_all(self, scores: torch.Tensor, rows: list[SamplerRow]) -> torch.Tensor:
        """process() of every row: at once for those that it would only divide by temperature."""
        is_scaled = [self._is_scaled_alone(row) for row in rows]
        temperatures = [
            row.sampling.temperature if scaled else 0.0
            for row, scaled in zip(rows, is_scaled, strict=True)
        ]
        divisors = torch.tensor(temperatures, dtype=scores.dtype).to(scores.device)
        processed = scaled_scores(scores, divisors)
        for i, row in enumerate(rows):
            if not (is_scaled[i] or self._is_plain_argmax(row)):
                processed[i] = self.process(scores[i], row)
        return processed

    def only_scales(self, row: SamplerRow) -> bool:
        """Whether score over temperature, and noise, choose this token and the row's later ones."""
        return self._is_plain_argmax(row) or self._is_scaled_alone(row)

    def _is_plain_argmax(self, row: SamplerRow) -> bool:
        return row.sampling.temperature == 0.0 and self._keeps_logits(row)

    def _is_scaled_alone(self, row: SamplerRow) -> bool:
        sampling = row.sampling
        keeps_all = sampling.top_k <= 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0
        return sampling.temperature > 0.0 and keeps_all and self._keeps_logits(row)

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

    def process(self, scores: torch.Tensor, row: SamplerRow) -> torch.Tensor:
        """Penalties, bias, min_tokens, temperature, top-k, top-p, min-p; removed entries are -inf.

        scores: fp32 [vocab_size], not changed. Returns fp32 log-probabilities up to a constant.
        """
        sampling = row.sampling
        scores = scores.clone()
        if sampling.has_penalties:
            _penalize(scores, row)
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            added = torch.tensor(biases, dtype=scores.dtype, device=scores.device)
            scores.index_add_(0, torch.tensor(ids, device=scores.device), added)
        if row.num_output_tokens < sampling.min_tokens:
            banned = sampling.stop_token_ids
            if not sampling.ignore_eos:
                banned += self._eos_token_ids
            scores[list(banned)] = float("-inf")
        if sampling.temperature == 0.0:
            return scores
        scores -= scores.max()  # dividing large scores would round their differences away
        scores /= sampling.temperature
        if 0 < sampling.top_k < len(scores):
            threshold = torch.topk(scores, sampling.top_k).values[-1]
            scores[scores < threshold] = float("-inf")
        if sampling.top_p < 1.0:
            scores[scores < _nucleus_threshold(scores, sampling.top_p)] = float("-inf")
        if sampling.min_p > 0.0:
            scores[scores < scores.max() + float(np.log(sampling.min_p))] = float("-inf")
        return scores


def scaled_scores(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Each row's distance to its largest score over its temperature; at 0 the row as it is.

    scores: fp32 [num_rows, vocab_size]; temperatures: [num_rows], of the scores' device. Reads
    nothing on the host: it may be part of a graph.
    """
    is_greedy = temperatures <= 0.0
    shift = scores.amax(dim=1).masked_fill(is_greedy, 0.0)
    scale = temperatures.to(scores.dtype).masked_fill(is_greedy, 1.0)
    return (scores - shift[:, None]).div_(scale[:, None])


def shared_draw(row: SamplerRow) -> Draw | None:
    """The noise that draft and target share at the row's position; None: greedy."""
    return None if row.sampling.temperature == 0.0 else _draw(row, Role.SHARED)


def _draw(row: SamplerRow, role: Role) -> Draw:
    """Proposals alone come from a new stream each round: a position may be drafted again after a
    rejection, by a drafter that has seen what its first draft there led to. Every other role
    draws once a position, or wants the same draw again."""
    step = row.num_drafted if role is Role.PROPOSE else 0
    return Draw(row.sampling.seed, row.position, role, step)


def _penalize(scores: torch.Tensor, row: SamplerRow) -> None:
    """The repetition penalty sees prompt and output (CTRL, arXiv 1909.05858), the others output."""
    assert row.history is not None
    sampling = row.sampling
    seen = torch.from_numpy(np.unique(row.history)).to(scores.device)
    if sampling.repetition_penalty != 1.0:
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output, counts = np.unique(row.history[row.num_prompt_tokens :], return_counts=True)
    if len(output) > 0:
        ids = torch.from_numpy(output).to(scores.device)
        counted = torch.from_numpy(counts).to(scores.device)
        scores[ids] -= sampling.frequency_penalty * counted.float()
        scores[ids] -= sampling.presence_penalty


def _nucleus_threshold(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The score of the last entry of the smallest set whose mass reaches top_p; ties stay in."""
    log_total = torch.logsumexp(scores, dim=0)
    for count in (min(_NUCLEUS_CANDIDATES, len(scores)), len(scores)):
        top = torch.topk(scores, count).values
        mass = torch.cumsum(torch.exp(top - log_total), dim=0)
        reached = torch.nonzero(mass >= top_p)
        if len(reached) > 0:
            return top[int(reached[0])]
    return top[-1]  # rounding kept the whole vocabulary's mass under top_p
