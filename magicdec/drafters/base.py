"""What the runner asks of a drafter, and what it gives one to draft with."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from magicdec.attention import AttentionContext, AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.drafts import Draft
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.sampler import Proposal, SamplerRow

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionContext], torch.Tensor]
"""(token ids [num_rows], positions [num_rows], context) -> logits [num_rows, a rank's share of the
vocabulary]."""

Propose = Callable[[torch.Tensor, list[SamplerRow]], list[Proposal]]
"""(logits as a Forward returns them, rows) -> one proposal a row, drawn as verification expects."""


class Drafter(Protocol):
    """Drafts for the sequences that name it. Whatever it proposes, the emitted tokens stand:
    a drafter that has lost or never had its state drafts worse, not wrong."""

    def propose(self, sequences: list[ScheduledSequence]) -> Sequence[Draft]:
        """At most draft_length tokens each; every sequence is a decode row of this drafter's."""
        ...

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """Before a verify forward over all of the step's sequences, in the layout's order.

        Returns what must be shown the forward's attention, if anything.
        """
        ...

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forgets sequences that will not come again; unknown ids are ignored."""
        ...
