"""Drafted tokens between their drafter and verification: how many there are is known at once, which
ones the host may learn later.

    drafted step by step   Proposals, on the host
    drafted by replays     entries of one buffer on the device: verification reads them there, and
                           they come to the host with what it chose, in one copy
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.kernels.gumbel import Winners, check_chosen
from magicdec.kernels.transfer import Arriving, send
from magicdec.sampler import Proposal


class Draft(Protocol):
    """One sequence's, in order. A tuple of proposals is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Proposal]:
        """Waits for the device where the tokens are not on the host."""
        ...


class DeviceTokens:
    """What replays drafted for all of their rows."""

    def __init__(self, chosen: torch.Tensor, num_rows: int) -> None:
        """`chosen`: int64 [num_steps, at least num_rows], -1 where nothing could be. It is written
        again by the next round's replays, so this round's last copy to the host takes it along."""
        self.chosen = chosen
        # [bucket, num_steps] -1 - the entry's place in the buffer
        self.references = -1 - np.arange(chosen.numel()).reshape(chosen.shape).T
        self._num_rows = num_rows
        self._rows: list[tuple[int, ...]] | None = None

    def arrive(self, chosen: list[int]) -> None:
        """The buffer's entries on the host, step by step.

        Raises ValueError where scores held a NaN.
        """
        stride = self.chosen.shape[1]
        steps = [chosen[i : i + self._num_rows] for i in range(0, len(chosen), stride)]
        for step in steps:
            check_chosen(step)
        self._rows = list(zip(*steps, strict=True))

    def rows(self) -> list[tuple[int, ...]]:
        """[num_rows][num_steps]. The host waits once, for all of them. Raises as arrive() does."""
        if self._rows is None:
            self.arrive(self.chosen.flatten().tolist())
        assert self._rows is not None
        return self._rows


@dataclass(frozen=True, slots=True)
class DeviceDraft:
    """The first tokens of one row."""

    tokens: DeviceTokens
    row: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Proposal]:
        return map(Proposal, self.token_ids())

    def token_ids(self) -> tuple[int, ...]:
        return self.tokens.rows()[self.row][: self.length]

    def references(self) -> NDArray[np.int64]:
        """Where the tokens are on the device, see resolve()."""
        return self.tokens.references[self.row, : self.length]


def token_ids_of(draft: Draft) -> Sequence[int]:
    """On the host, which waits for them where it must."""
    if isinstance(draft, DeviceDraft):
        return draft.token_ids()
    return tuple([proposal.token_id for proposal in draft])


def references_of(draft: Draft) -> Sequence[int] | NDArray[np.int64]:
    """token_ids_of() without waiting: references where the tokens are on the device."""
    return draft.references() if isinstance(draft, DeviceDraft) else token_ids_of(draft)


def tokens_on_device(drafts: Sequence[Draft]) -> torch.Tensor | None:
    """What references of these drafts are resolved from: one drafter replays, so one buffer."""
    tokens = _device_tokens(drafts)
    return None if tokens is None else tokens.chosen


def _device_tokens(drafts: Sequence[Draft]) -> DeviceTokens | None:
    return next((draft.tokens for draft in drafts if isinstance(draft, DeviceDraft)), None)


@dataclass(frozen=True, slots=True)
class AcceptedDrafts:
    """What verification made of drafts, on the device alone."""

    counts: torch.Tensor  # int64 [num_drafts], accepted
    token_ids: torch.Tensor  # int64 [num_drafts], the recovered or bonus token

    @classmethod
    def of(
        cls,
        drafts: Sequence[Draft],
        starts: Sequence[int],  # of each draft's choices, which are one more than its tokens
        chosen: torch.Tensor,  # int64 [num_choices], -1 where nothing could be
    ) -> "AcceptedDrafts | None":
        """verification.accept() of each, by launches that nobody waits for; None where drafts are
        on the host."""
        there = [draft for draft in drafts if isinstance(draft, DeviceDraft)]
        if not there or len(there) < len(drafts):
            return None
        lengths = np.array([len(draft) for draft in there])[:, None]
        column = np.arange(lengths.max() + 1)
        own_choice = np.array(starts)[:, None] + np.minimum(column, lengths)
        is_drafted = column[:-1] < lengths
        drafted = np.zeros(is_drafted.shape, dtype=np.int64)
        drafted[is_drafted] = -1 - np.concatenate([draft.references() for draft in there])
        sizes = [len(column), len(column) - 1, len(column) - 1]
        places = np.concatenate([own_choice, drafted, is_drafted], axis=1)
        sent = send(torch.from_numpy(places), chosen.device)
        own, draft, is_there = sent.split_with_sizes(sizes, dim=1)
        choices = chosen.take(own)
        agree = (choices[:, :-1] == there[0].tokens.chosen.take(draft)).long() * is_there
        counts = agree.cumprod(dim=1).sum(dim=1)
        token_ids = choices.gather(1, counts[:, None])[:, 0]
        return cls(counts, token_ids.clamp(min=0))


def resolve(token_ids: torch.Tensor, chosen: torch.Tensor) -> None:
    """Puts tokens in the place of references to them, in place: -1 - n is entry n of `chosen`.

    Nothing is read on the host. Entries that are no tokens become one: who reads them on the host
    finds out.
    """
    index = (-1 - token_ids).clamp(min=0)
    found = chosen.flatten().index_select(0, index).clamp(min=0)
    token_ids.copy_(torch.where(token_ids < 0, found.to(token_ids.dtype), token_ids))


def fetch(
    winners: Winners,
    drafts: Sequence[Draft],
    meanwhile: Callable[[torch.Tensor], None] | None = None,
) -> list[int]:
    """winners.token_ids(), and in the same copy the drafts that are on the device. `meanwhile` is
    given the choices there, before the host waits: what it launches is not waited for.

    Raises ValueError for scores that hold a NaN, of drafts and winners.
    """
    tokens, chosen = _device_tokens(drafts), winners.chosen()
    both = chosen if tokens is None else torch.cat([chosen, tokens.chosen.flatten()])
    arriving = Arriving(both)
    if meanwhile is not None:
        meanwhile(chosen)
    arrived = arriving.wait()
    if tokens is not None:
        tokens.arrive(arrived[len(chosen) :])
    check_chosen(arrived[: len(chosen)])
    return arrived[: len(chosen)]
