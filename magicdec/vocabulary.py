"""Which token ids a rank's logits are of, and how ranks tell one another of theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels.gumbel import ENTRIES_PER_BLOCK, Winners

AllGather = Callable[[torch.Tensor], torch.Tensor]
"""A rank's tensor -> every rank's, all of one shape and dtype: [num_ranks, *shape]."""


def even_bounds(size: int, num_ranks: int) -> tuple[int, ...]:
    """[num_ranks + 1] bounds of shares alike but for one block of noise, none cut in two.

    Raises ValueError where there are fewer blocks than ranks.
    """
    num_blocks = -(-size // ENTRIES_PER_BLOCK)
    if num_blocks < num_ranks:
        raise ValueError(
            f"a vocabulary of {size} entries does not go round {num_ranks} ranks: at least "
            f"{ENTRIES_PER_BLOCK * (num_ranks - 1) + 1} are needed"
        )
    starts = [ENTRIES_PER_BLOCK * (num_blocks * rank // num_ranks) for rank in range(num_ranks)]
    return (*starts, size)


def _alone(part: torch.Tensor) -> torch.Tensor:
    return part[None]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rank r's logits are of the ids from bounds[r] to bounds[r + 1].

    What exchanges is called by all ranks together, with as many rows; each of them gets the same
    answer. One rank exchanges nothing.
    """

    bounds: tuple[int, ...]  # [num_ranks + 1]; all but the last are multiples of ENTRIES_PER_BLOCK
    rank: int = 0
    all_gather: AllGather = _alone

    @classmethod
    def whole(cls, size: int) -> "Vocabulary":
        return cls((0, size))

    @property
    def num_ranks(self) -> int:
        return len(self.bounds) - 1

    @property
    def size(self) -> int:
        """Of all ranks together."""
        return self.bounds[-1]

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def shares(self) -> tuple[int, ...]:
        """[num_ranks] how many ids each rank's logits are of."""
        return tuple(stop - start for start, stop in pairwise(self.bounds))

    def __contains__(self, token_id: int) -> bool:
        """Whether this rank's logits are of it."""
        return self.start <= token_id < self.stop

    def holds(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the ids this rank's logits are of."""
        return (token_ids >= self.start) & (token_ids < self.stop)

    def greatest(self, values: torch.Tensor) -> torch.Tensor:
        """Of each entry the greatest over the ranks; NaN where a rank has one."""
        return values if self.num_ranks == 1 else self.all_gather(values).amax(dim=0)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, size] of every rank's [num_rows, its share]."""
        if self.num_ranks == 1:
            return rows
        missing = max(self.shares) - rows.shape[1]
        parts = self.all_gather(torch.nn.functional.pad(rows, (0, missing)))
        return torch.cat(
            [part[:, :share] for part, share in zip(parts, self.shares, strict=True)], dim=1
        )

    def best(self, winners: Winners) -> Winners:
        """Of each row the greatest value of any rank, and the lowest entry that has it."""
        if self.num_ranks == 1:
            return winners
        both = torch.stack([winners.values, winners.entries.double()])
        values, entries = self.all_gather(both).unbind(dim=1)
        best = values.amax(dim=0)
        first = entries.masked_fill(values < best, float("inf")).amin(dim=0)
        return Winners(best, first.long())
