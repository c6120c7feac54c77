"""The next round's drafts, launched before the host has this round's tokens.

    device   | verify n | choose n | drafts n+1 ................... | verify n+1 | choose n+1 |
    host       launch n+1's drafts, wait for n | emit, schedule, launch verify n+1 | launch, wait

Where the drafts begin is found on the device (AcceptedDrafts). What is asked for then is found by
sequence: it has gone on by the very tokens that were chosen for it. Who has ended is left out;
where somebody else is to draft too, or over another view, all draft anew. Drafts are never written
to the pages, so nothing is lost but their time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from magicdec.batch import DraftChoice, ScheduledSequence
from magicdec.device_span import DeviceSpan
from magicdec.drafts import DeviceDraft


@dataclass(frozen=True, slots=True)
class NextDrafts:
    """Of one round's sequences for the round after it, and for no later one."""

    drafts: dict[int, tuple[DraftChoice | None, DeviceDraft]]  # by sequence_id, and how they read
    span: DeviceSpan

    def drafts_of(self, sequences: Sequence[ScheduledSequence]) -> list[DeviceDraft] | None:
        """As long as they are asked for, or shorter; None: not all of them are here."""
        found = []
        for sequence in sequences:
            choice, draft = self.drafts.get(sequence.sequence_id, (None, None))
            if draft is None or not _reads_alike(sequence.draft, choice):
                return None
            length = min(draft.length, sequence.draft_length)
            found.append(DeviceDraft(draft.tokens, draft.row, length))
        return found


def _reads_alike(wanted: DraftChoice | None, begun: DraftChoice | None) -> bool:
    if wanted is None or begun is None:
        return False
    views = [(choice.drafter, choice.draft_budget) for choice in (wanted, begun)]
    return views[0] == views[1]
