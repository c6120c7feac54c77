"""Top-k, top-p and min-p as one threshold a row: what scores less is removed.

Each rank sends its best scores and the mass of all of its own. Where these settle a row's
threshold, every rank finds it alike; the other rows' scores are sent whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from magicdec.kernels.transfer import send
from magicdec.types import SamplingParams
from magicdec.vocabulary import Vocabulary

_CANDIDATES_ALONE = 1024  # the best scores of one rank that has them all
_CANDIDATES_SENT = 256  # by each of several ranks

# exp(score) is counted in these units, as whole numbers whose sums are exact in fp64 in any order:
# whichever ranks add up, a nucleus ends at the same entry. Holds for 2**19 entries.
_UNITS = 2.0**34


def truncate(
    scores: torch.Tensor,  # fp32 [num_rows, this rank's share], the greatest of any rank at 0
    samplings: Sequence[SamplingParams],  # [num_rows]
    vocabulary: Vocabulary,
) -> torch.Tensor:
    """The scores, with -inf for entries that the row's top-k, top-p or min-p removes; ties with
    the last that stays, stay."""
    limits = _Limits.of(samplings, vocabulary.size, scores.device)
    thresholds = limits.min_score
    if any(_is_cut(sampling, vocabulary.size) for sampling in samplings):
        count = _num_candidates(samplings, vocabulary)
        found, is_settled = limits.thresholds(_best_of_ranks(scores, count, vocabulary))
        open_rows = (~is_settled).nonzero()[:, 0]
        if len(open_rows) > 0:
            rows = vocabulary.join(scores[open_rows])
            found[open_rows], _ = limits.of_rows(open_rows).thresholds(_all_of(rows))
        thresholds = torch.maximum(thresholds, found)
    return scores.masked_fill(scores < thresholds[:, None], float("-inf"))


def removes(sampling: SamplingParams, vocab_size: int) -> bool:
    """Whether a row with these parameters has anything to truncate."""
    return sampling.temperature > 0.0 and (_is_cut(sampling, vocab_size) or sampling.min_p > 0.0)


def _is_cut(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Scores of a row in falling order, of which none is missing that is above `floor`."""

    scores: torch.Tensor  # fp32 [num_rows, num_candidates]
    floor: torch.Tensor  # fp32 [num_rows]; -inf: nothing is missing that could be chosen
    mass: torch.Tensor  # fp64 [num_rows] of the whole row


@dataclass(frozen=True, slots=True)
class _Limits:
    """The rows' parameters, [num_rows] each."""

    top_k: torch.Tensor  # int64; 0: off
    top_p: torch.Tensor  # fp64; 1: off
    min_score: torch.Tensor  # fp32; -inf: off

    @classmethod
    def of(
        cls, samplings: Sequence[SamplingParams], vocab_size: int, device: torch.device
    ) -> "_Limits":
        columns = [
            (
                s.top_k if s.top_k < vocab_size else 0,
                s.top_p,
                math.log(s.min_p) if s.min_p > 0.0 else -math.inf,
            )
            for s in samplings
        ]
        top_k, top_p, min_score = send(torch.tensor(columns, dtype=torch.float64), device).unbind(1)
        return cls(top_k.long(), top_p, min_score.float())

    def of_rows(self, index: torch.Tensor) -> "_Limits":
        return _Limits(self.top_k[index], self.top_p[index], self.min_score[index])

    def thresholds(self, candidates: _Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """By top-k, then top-p of what that leaves: fp32 [num_rows], -inf where both are off; and
        whether a row's candidates settle it."""
        scores, floor = candidates.scores, candidates.floor
        has_k, has_p = self.top_k > 0, self.top_p < 1.0
        last = scores.shape[1] - 1
        kth = scores.gather(1, (self.top_k - 1).clamp(0, last)[:, None])[:, 0]
        kth = torch.where(has_k, kth, -math.inf)
        # What is missing is no better than the floor: it moves no candidate above that to another
        # place, but may be as good as the k-th.
        knows_kth = ~has_k | ((self.top_k <= last + 1) & (kth >= floor))
        knows_ties = ~has_k | (kth > floor) | (kth == -math.inf)
        weights = _weights(scores)
        kept = weights.masked_fill(scores < kth[:, None], 0.0).sum(1, dtype=torch.float64)
        mass = torch.where(has_k, kept, candidates.mass)
        reached = weights.cumsum(1, dtype=torch.float64) >= (self.top_p * mass)[:, None]
        end = (~reached).sum(dim=1).clamp(max=last)
        nucleus = scores.gather(1, end[:, None])[:, 0]
        knows_nucleus = knows_ties & reached[:, last] & (nucleus >= floor)
        found = torch.where(has_p, torch.maximum(kth, nucleus), kth)
        return found, knows_kth & (~has_p | knows_nucleus)


def _num_candidates(samplings: Sequence[SamplingParams], vocabulary: Vocabulary) -> int:
    """Of each rank. Top-k alone needs no more than k."""
    most = _CANDIDATES_ALONE if vocabulary.num_ranks == 1 else _CANDIDATES_SENT
    if all(sampling.top_p >= 1.0 for sampling in samplings):
        most = min(most, max(s.top_k for s in samplings if s.top_k < vocabulary.size))
    return min(most, max(vocabulary.shares))


def _best_of_ranks(scores: torch.Tensor, count: int, vocabulary: Vocabulary) -> _Candidates:
    own = scores.topk(min(count, scores.shape[1]), dim=1).values
    own = torch.nn.functional.pad(own, (0, count - own.shape[1]), value=-math.inf)
    mass = _weights(scores).sum(1, keepdim=True, dtype=torch.float64)
    # One message, in words of 32 bits.
    words = torch.cat([own.view(torch.int32), mass.view(torch.int32)], dim=1)
    words = vocabulary.all_gather(words)
    by_rank = words[..., :count].view(torch.float32)  # [num_ranks, num_rows, count]
    masses = words[..., count:].clone(memory_format=torch.contiguous_format).view(torch.float64)
    misses_some = torch.tensor([share > count for share in vocabulary.shares])
    least = by_rank[..., -1].where(misses_some[:, None].to(scores.device), -math.inf)
    merged = by_rank.transpose(0, 1).flatten(1)
    if vocabulary.num_ranks > 1:
        merged = merged.sort(dim=1, descending=True).values
    return _Candidates(merged, least.amax(dim=0), masses.sum(dim=0)[:, 0])


def _all_of(rows: torch.Tensor) -> _Candidates:
    """Of whole rows."""
    mass = _weights(rows).sum(1, dtype=torch.float64)
    return _Candidates(
        rows.sort(dim=1, descending=True).values, torch.full_like(rows[:, 0], -math.inf), mass
    )


def _weights(scores: torch.Tensor) -> torch.Tensor:
    """exp(score) in units, whole numbers in fp32; 0 for what was removed."""
    return scores.exp().mul_(_UNITS).round_()
