"""Counter-based randomness: a pure function of (seed, position, vocabulary entry, role).

Drafter-invariant verification (arXiv 2408.07978) needs draft and target to see the same noise,
whatever step, batch or replica asks for it. Rejection sampling needs the opposite: draws that know
nothing of each other at one position, which is what roles are for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

ENTRIES_PER_BLOCK = 8  # of one Philox counter; a part of the vocabulary begins with a block

# Noise lies in [-3.2, 22.9]: an entry further than that spread below the top cannot win.
_NOISE_SPREAD = 26.2


class Role(IntEnum):
    """What a draw at a position is for; the streams of two roles are disjoint.

    A draw used twice biases what is emitted: the token that was proposed, whether it is accepted
    and what replaces it must be independent.
    """

    SHARED = 0  # one noise for draft and target; resuming a stream relies on its values
    PROPOSE = 1
    ACCEPT = 2
    RECOVER = 3  # recovered and bonus tokens: a position has one or the other


@dataclass(slots=True)  # made for every row of every step: frozen, it takes three times as long
class Draw:
    """What the noise of one row is a function of."""

    seed: int
    position: int
    role: Role = Role.SHARED
    step: int = 0

    def words(self, num_words: int, first_entry: int = 0) -> NDArray[np.uint32]:
        return random_words(self.seed, self.position, num_words, self.role, self.step, first_entry)


@dataclass(frozen=True, slots=True)
class Winners:
    """Of each row the greatest score plus noise, and the first entry that has it."""

    values: torch.Tensor  # fp64 [num_rows]; NaN: the row holds one; -inf: it has nothing above that
    entries: torch.Tensor  # int64 [num_rows], of the whole vocabulary; for other values any number

    def chosen(self) -> torch.Tensor:
        """The entries, int64 [num_rows]; -1 for a row from which nothing can be chosen."""
        return torch.where(self.values > float("-inf"), self.entries, -1)

    def token_ids(self) -> list[int]:
        """Raises ValueError for a row that holds a NaN, or nothing above -inf."""
        chosen: list[int] = self.chosen().tolist()
        check_chosen(chosen)
        return chosen


def check_chosen(chosen: list[int]) -> None:
    """Raises ValueError where a row's entry is -1: there was nothing to choose."""
    if -1 in chosen:
        row = chosen.index(-1)
        raise ValueError(f"row {row} of the scores holds a NaN, or nothing above -inf")


@dataclass(frozen=True, slots=True)
class Scaling:
    """What becomes of logits before they are chosen from."""

    greatest: torch.Tensor  # fp32 [num_rows], of the whole vocabulary
    temperatures: torch.Tensor  # fp32 [num_rows]

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        return scaled_scores(logits.float(), self.greatest, self.temperatures)


def scaled_scores(
    scores: torch.Tensor,  # fp32 [num_rows, a rank's share of the vocabulary]
    greatest: torch.Tensor,  # fp32 [num_rows], of all ranks
    temperatures: torch.Tensor,  # [num_rows]
) -> torch.Tensor:
    """Each row's distance to its greatest score over its temperature; at 0 the row as it is.

    All are on one device, and nothing is read on the host: it may be part of a graph.
    """
    is_greedy = temperatures <= 0.0
    # Dividing large scores would round their differences away.
    shift = greatest.masked_fill(is_greedy, 0.0)
    scale = temperatures.to(scores.dtype).masked_fill(is_greedy, 1.0)
    return (scores - shift[:, None]).div_(scale[:, None])


class GumbelArgmax(Protocol):
    """gumbel_argmax, by whichever code."""

    def __call__(
        self,
        scores: torch.Tensor,
        draws: Sequence[Draw | None],
        first_entry: int = 0,
        scaling: Scaling | None = None,
    ) -> Winners: ...


def random_words(
    seed: int,
    position: int,
    num_words: int,
    role: int = Role.SHARED,
    step: int = 0,
    first_entry: int = 0,  # a multiple of ENTRIES_PER_BLOCK
) -> NDArray[np.uint32]:
    """Philox4x64-10 with key (seed, 0) and counter (block, position, role, step), blocks from 1.

    Entry v is half v % 2 (low half first) of 64-bit word v // 2 of the stream.
    """
    # NumPy increments the counter before its first block.
    stream = np.random.Philox(
        key=np.array([seed, 0], dtype=np.uint64),
        counter=np.array([first_entry // ENTRIES_PER_BLOCK, position, role, step], dtype=np.uint64),
    )
    words = stream.random_raw((num_words + 1) // 2).astype("<u8", copy=False)
    return words.view("<u4")[:num_words]


def draw_keys(draws: Sequence[Draw | None]) -> NDArray[np.uint64]:
    """[num_rows, 5] for a compiled kernel: seed, position, role, step, whether there is a draw."""
    keys = [(0,) * 5 if d is None else (d.seed, d.position, d.role, d.step, 1) for d in draws]
    return np.array(keys, dtype=np.uint64).reshape(-1, 5)


def uniforms(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """(word + 0.5) / 2**32: above 0, and below 1 by enough that u * q < q for every q > 0."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def gumbel_noise(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """-log(-log(u)) of the words' uniforms, so within [-3.2, 22.9] and never infinite."""
    return np.asarray(-np.log(-np.log(uniforms(words))))


def perturbed_argmax(scores: NDArray[np.floating[Any]], draw: Draw) -> int:
    """One draw from the law exp(scores), [num_entries], up to a constant; never an entry at -inf.

    Raises ValueError for scores that hold a NaN.
    """
    return _perturbed_best(scores, draw, 0)[1]


def _perturbed_best(
    scores: NDArray[np.floating[Any]], draw: Draw, first_entry: int
) -> tuple[float, int]:
    """The greatest score plus noise, and its place among these scores."""
    candidates = np.flatnonzero(scores >= scores.max() - _NOISE_SPREAD)
    words = draw.words(len(scores), first_entry)[candidates]
    perturbed = scores[candidates].astype(np.float64) + gumbel_noise(words)
    best = int(np.argmax(perturbed))
    return float(perturbed[best]), int(candidates[best])


def check_draws(scores: torch.Tensor, draws: Sequence[Draw | None], first_entry: int) -> None:
    """Raises ValueError unless there is a draw a row and the scores begin with a block of noise."""
    if len(draws) != len(scores):
        raise ValueError(f"draws must be one a row ({len(scores)}), got {len(draws)}")
    if first_entry % ENTRIES_PER_BLOCK != 0:
        raise ValueError(
            f"first_entry must be a multiple of {ENTRIES_PER_BLOCK}, got {first_entry}"
        )


def gumbel_argmax(
    scores: torch.Tensor,  # [num_rows, num_entries], any float dtype
    draws: Sequence[Draw | None],  # a row; None: its largest score, the first of equals
    first_entry: int = 0,  # of the vocabulary, where the scores are of a part of it
    scaling: Scaling | None = None,  # None: scores are chosen from as they are
) -> Winners:
    """One entry a row. Raises ValueError for what check_draws refuses."""
    check_draws(scores, draws, first_entry)
    scores = scores if scaling is None else scaling.of(scores)
    tops, places = scores.max(dim=-1)
    values, entries = tops.double(), places + first_entry
    for i, draw in enumerate(draws):
        if draw is not None and values[i] > float("-inf"):
            row = scores[i].float().cpu().numpy()
            values[i], place = _perturbed_best(row, draw, first_entry)
            entries[i] = place + first_entry
    return Winners(values, entries)
