"""Ranks that are threads: they share a vocabulary, and exchange what they have of it in memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

from magicdec.vocabulary import Vocabulary

Result = TypeVar("Result")


class ThreadRanks:
    """Runs one function on every rank at once. Counts the exchanges of the last run."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = tuple(bounds)
        self.num_exchanges = 0

    def run(self, step: Callable[[Vocabulary], Result]) -> list[Result]:
        """In rank order. Ranks that do not exchange in step, or unlike tensors, fail."""
        num_ranks = len(self._bounds) - 1
        barrier = Barrier(num_ranks)
        shown: list[torch.Tensor] = [torch.empty(0)] * num_ranks
        counts = [0] * num_ranks

        def exchange(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def all_gather(part: torch.Tensor) -> torch.Tensor:
                shown[rank] = part
                barrier.wait(timeout=30)
                assert all(other.dtype == part.dtype for other in shown)
                gathered = torch.stack(shown)
                barrier.wait(timeout=30)
                counts[rank] += 1
                return gathered

            return all_gather

        def run_rank(rank: int) -> Result:
            return step(Vocabulary(self._bounds, rank, exchange(rank)))

        with ThreadPoolExecutor(num_ranks) as threads:
            results = list(threads.map(run_rank, range(num_ranks)))
        assert len(set(counts)) == 1
        self.num_exchanges = counts[0]
        return results
