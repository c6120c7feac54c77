"""A smaller model drafts with K/V of its own."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.attention import AttentionContext, AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.drafters.base import Propose
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import LayerSpec
from magicdec.sampler import Proposal, SamplerRow

_MAX_ROWS = 512  # of one forward that catches up: bounds its activations

Positions = NDArray[np.int64]
Piece = tuple[ScheduledSequence, Positions]
"""Rows of one sequence in a forward: their absolute positions, ascending."""


@dataclass(frozen=True, slots=True)
class DraftModel:
    """The smaller model, whole on this rank.

    `forward` maps token ids [num_rows], positions [num_rows], an attention context and the rows
    [num_kept] whose logits are wanted to logits [num_kept, vocab_size].
    """

    forward: Callable[
        [torch.Tensor, torch.Tensor, AttentionContext, torch.Tensor | None], torch.Tensor
    ]
    layers: tuple[LayerSpec, ...]
    vocab_size: int


class DraftCache(Protocol):
    """Where the draft model's K/V lie, and which of them are still true."""

    def missing(self, sequence: ScheduledSequence) -> list[Positions]:
        """Positions whose K/V must be computed before the next token can be proposed, in the
        order of the forwards that compute them. The last is the sequence's last token."""
        ...

    def attention(self, pieces: list[Piece]) -> AttentionContext:
        """Stores the rows' K/V and lets them see what came before."""
        ...

    def mark_fed(self, sequences: list[ScheduledSequence]) -> None:
        """What was missing is there."""
        ...

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> list[ScheduledSequence]:
        """Before a verify forward; returns the sequences whose tokens are to be fed with it."""
        ...

    def release(self, sequence_ids: Sequence[int]) -> None: ...


class DraftModelDrafter:
    """Feeds the draft model what it has not seen of each sequence, then lets it decode.

    Every rank of a sharded target runs a whole draft model and drafts for itself, with no
    exchange. The ranks must verify the same tokens, and they do: the weights, the batch and hence
    the shape of each forward are the same on every rank, and so are the threads, so that sums
    round alike; what is then chosen is a function of the logits and of the request's seed.

    K/V of drafted tokens are scratch: the next round feeds those that were accepted again, in the
    same forward as the token that followed them.
    """

    def __init__(
        self, model: DraftModel, propose: Propose, cache: DraftCache, vocab_size: int
    ) -> None:
        self._model = model
        self._propose = propose
        self._cache = cache
        self._vocab_size = vocab_size  # the target's

    def propose(self, sequences: list[ScheduledSequence]) -> list[tuple[Proposal, ...]]:
        """See Drafter.propose. A sequence whose draft is long enough leaves the batch."""
        logits = self._feed(sequences)
        drafts: list[tuple[Proposal, ...]] = [() for _ in sequences]
        active = list(range(len(sequences)))
        while active:
            rows = [
                SamplerRow.after(sequences[i], tuple(p.token_id for p in drafts[i])) for i in active
            ]
            for i, proposal in zip(active, self._propose(logits, rows), strict=True):
                drafts[i] = (*drafts[i], proposal)
            active = [i for i in active if len(drafts[i]) < sequences[i].draft_length]
            if active:
                pieces = [_last_drafted(sequences[i], drafts[i]) for i in active]
                logits = self._run(pieces, np.array([drafts[i][-1].token_id for i in active]))
        return drafts

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """See Drafter.watch."""
        prefilled = self._cache.watch(sequences, layout)
        if prefilled:
            self._feed(prefilled)
        return None

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See Drafter.release."""
        self._cache.release(sequence_ids)

    def _feed(self, sequences: list[ScheduledSequence]) -> torch.Tensor:
        """Computes the K/V that are missing; logits after each last token, [batch, vocab_size]."""
        queues = [deque(_split(self._cache.missing(s))) for s in sequences]
        last: dict[int, torch.Tensor] = {}
        while any(queues):
            room = _MAX_ROWS
            chosen: list[int] = []
            pieces: list[Piece] = []
            for i, queue in enumerate(queues):
                if queue and len(queue[0]) <= room:
                    room -= len(queue[0])
                    chosen.append(i)
                    pieces.append((sequences[i], queue.popleft()))
            logits = self._run(pieces, np.concatenate([_tokens_at(*piece) for piece in pieces]))
            last.update(zip(chosen, logits, strict=True))
        self._cache.mark_fed(sequences)
        return torch.stack([last[i] for i in range(len(sequences))])

    def _run(self, pieces: list[Piece], token_ids: NDArray[np.int64]) -> torch.Tensor:
        """One packed forward; logits of each piece's last row, [num_pieces, vocab_size]."""
        keep = np.cumsum([len(positions) for _, positions in pieces]) - 1
        # Ids that only the target's padded vocabulary has are no words: any other says as much.
        known = np.minimum(token_ids, self._model.vocab_size - 1)
        logits = self._model.forward(
            torch.from_numpy(known),
            torch.from_numpy(np.concatenate([positions for _, positions in pieces])),
            self._cache.attention(pieces),
            torch.from_numpy(keep),
        )
        return fit_vocabulary(logits, self._vocab_size)


def fit_vocabulary(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[num_rows, vocab_size]: entries past the target's are cut, missing ones impossible.

    Models of one tokenizer may pad their vocabularies differently.
    """
    missing = vocab_size - logits.shape[1]
    if missing <= 0:
        return logits[:, :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))


def _last_drafted(sequence: ScheduledSequence, draft: tuple[Proposal, ...]) -> Piece:
    return sequence, np.array([sequence.num_tokens + len(draft) - 1])


def _tokens_at(sequence: ScheduledSequence, positions: Positions) -> NDArray[np.int64]:
    assert sequence.history is not None
    return sequence.history[positions]


def _split(runs: list[Positions]) -> list[Positions]:
    return [run[i : i + _MAX_ROWS] for run in runs for i in range(0, len(run), _MAX_ROWS)]
