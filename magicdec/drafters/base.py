"""What the runner asks of a drafter."""

from collections.abc import Callable
from typing import Protocol

import torch

from magicdec.attention import AttentionContext
from magicdec.batch import ScheduledSequence

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionContext], torch.Tensor]
"""(token ids [num_rows], positions [num_rows], context) -> logits [num_rows, vocab_size]."""


class Drafter(Protocol):
    def propose(
        self, sequences: list[ScheduledSequence], draft_budget: int
    ) -> list[tuple[int, ...]]:
        """Each sequence's draft_length tokens; every sequence is a decode row."""
        ...
