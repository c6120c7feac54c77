"""A rank's drafters, as its steps ask them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from magicdec.attention import AttentionObserver
from magicdec.batch import Batch, ScheduledSequence
from magicdec.device_span import DeviceSpan
from magicdec.drafters.base import Drafter
from magicdec.drafters.next_drafts import NextDrafts
from magicdec.drafters.self_draft import SelfDrafter
from magicdec.drafts import DeviceDraft, Draft
from magicdec.kernels.paged_layout import PagedLayout


@dataclass(frozen=True, slots=True)
class Drafted:
    """What one step verifies."""

    drafts: Sequence[Draft]  # a sequence
    spans: Sequence[DeviceSpan]  # of drafting
    # Begins with verification where drafts were begun before the step, whose time on the host has
    # a part of theirs, asked for or not; to be ended by who verifies.
    verifying: DeviceSpan | None = None

    def divide(self, seconds: float) -> tuple[float, float]:
        """Seconds of drafting and of the rest, of a step that took so long on the host."""
        drafting = sum(span.seconds() for span in self.spans)
        return drafting, seconds - drafting if self.verifying is None else self.verifying.seconds()


class RankDrafters:
    """By name: several names may be one drafter's."""

    def __init__(self, by_name: Mapping[str, Drafter], device: torch.device) -> None:
        self.by_name = by_name
        self._each = list({id(drafter): drafter for drafter in by_name.values()}.values())
        self._device = device
        self._next: NextDrafts | None = None  # launched while the host waited for the step before

    def release(self, sequence_ids: Sequence[int]) -> None:
        for drafter in self._each:
            drafter.release(sequence_ids)

    def propose(self, sequences: Sequence[ScheduledSequence]) -> Drafted:
        """Each drafter proposes for its own sequences in one call."""
        begun, self._next = self._next, None
        drafts: list[Draft] = [() for _ in sequences]
        spans: list[DeviceSpan] = []
        for drafter in self._each:
            mine = [i for i, s in enumerate(sequences) if self._drafts_for(drafter, s)]
            if not mine:
                continue
            own = [sequences[i] for i in mine]
            found: Sequence[Draft] | None = None
            if begun is not None and isinstance(drafter, SelfDrafter):
                found = begun.drafts_of(own)
            if begun is not None and found is not None:
                spans.append(begun.span)
            else:
                spans.append(DeviceSpan(self._device))
                found = drafter.propose(own)
                spans[-1].end()
            for i, draft in zip(mine, found, strict=True):
                drafts[i] = draft
        return Drafted(drafts, spans, None if begun is None else DeviceSpan(self._device))

    def _drafts_for(self, drafter: Drafter, sequence: ScheduledSequence) -> bool:
        draft = sequence.draft
        return (
            draft is not None and draft.draft_length > 0 and self.by_name[draft.drafter] is drafter
        )

    def watch(self, batch: Batch, layout: PagedLayout) -> list[AttentionObserver]:
        """Who is to see the forward over the batch."""
        watched = [drafter.watch(batch.sequences, layout) for drafter in self._each]
        return [observer for observer in watched if observer is not None]

    def begin_next(self, batch: Batch, drafts: Sequence[Draft], chosen: torch.Tensor) -> None:
        """Launches the next step's drafts where the device has all that they begin with: `chosen`
        are the choices of all of the batch's sequences, see VerificationRule.verify."""
        mine = [i for i, draft in enumerate(drafts) if isinstance(draft, DeviceDraft)]
        counts = np.array([len(draft) + 1 for draft in drafts])
        starts = (np.cumsum(counts) - counts)[mine].tolist()
        for drafter in self._each:
            if mine and isinstance(drafter, SelfDrafter):
                own = [batch.sequences[i] for i in mine]
                self._next = drafter.begin_next(own, [drafts[i] for i in mine], starts, chosen)
