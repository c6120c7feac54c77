"""What followed the same words before: a lookup in prompt and output, without weights.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); LLMA (arXiv 2304.04487).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from magicdec.attention import AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.sampler import Proposal

# One token recurs everywhere and says little of what follows; a match of four tokens hardly gets
# more telling by being longer.
MIN_NGRAM = 2
MAX_NGRAM = 4


class NgramDrafter:
    """Keeps nothing: a sequence's history is all it needs."""

    def propose(self, sequences: list[ScheduledSequence]) -> list[tuple[Proposal, ...]]:
        """See Drafter.propose. The draft is empty where no n-gram recurs; its tokens have no law:
        they are proposed with certainty."""
        drafts = []
        for sequence in sequences:
            assert sequence.history is not None
            found = lookup(sequence.history, sequence.draft_length)
            drafts.append(tuple(Proposal(token_id) for token_id in found.tolist()))
        return drafts

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """See Drafter.watch."""
        return None

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See Drafter.release."""


def lookup(history: NDArray[np.int64], draft_length: int) -> NDArray[np.int64]:
    """The tokens that followed the latest earlier occurrence of history's longest suffix that has
    one, of MAX_NGRAM down to MIN_NGRAM tokens: [draft_length], or [0] where there is none.

    An occurrence may overlap the suffix. A text that repeats itself with period k is then
    continued with that period: past the end of the history, the draft's own tokens follow.
    """
    num_tokens = len(history)
    # Where the suffix's last token stands before the end; each longer suffix thins these out.
    ends = np.flatnonzero(history[:-1] == history[-1:])
    latest = -1
    for size in range(2, MAX_NGRAM + 1):
        ends = ends[ends >= size - 1]
        if size > num_tokens or len(ends) == 0:
            break
        ends = ends[history[ends - (size - 1)] == history[num_tokens - size]]
        if size >= MIN_NGRAM and len(ends) > 0:
            latest = int(ends[-1])
    if latest < 0:
        return history[:0]
    following = history[latest + 1 :]
    return following[np.arange(draft_length) % len(following)]
