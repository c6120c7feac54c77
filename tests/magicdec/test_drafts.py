"""Drafts on the device are read there by reference, and come to the host with what was chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.drafts import (
    AcceptedDrafts,
    DeviceDraft,
    DeviceTokens,
    Draft,
    fetch,
    references_of,
    resolve,
    token_ids_of,
    tokens_on_device,
)
from magicdec.kernels.gumbel import Winners
from magicdec.sampler import Proposal
from magicdec.verification import accept

CHOSEN = torch.tensor([[11, 12, 13, 0], [21, 22, 23, 0]])  # [num_steps, bucket], of three rows
ON_HOST = (Proposal(7), Proposal(8), Proposal(9))


def winners(entries: list[int], best: float = 0.0) -> Winners:
    values = torch.full((len(entries),), best, dtype=torch.float64)
    return Winners(values, torch.tensor(entries))


def test_references_stand_for_tokens_until_the_device_resolves_them() -> None:
    tokens = DeviceTokens(CHOSEN, num_rows=3)
    drafts: list[Draft] = [DeviceDraft(tokens, 2, 2), ON_HOST, DeviceDraft(tokens, 0, 1)]
    found = tokens_on_device(drafts)
    assert found is not None
    ids = torch.tensor([i for draft in drafts for i in references_of(draft)], dtype=torch.int32)
    resolve(ids, found)
    assert ids.tolist() == [13, 23, 7, 8, 9, 11]
    assert tokens_on_device([(), ON_HOST]) is None


def test_drafts_are_those_of_the_host_once_fetched() -> None:
    tokens = DeviceTokens(CHOSEN.clone(), num_rows=3)
    drafts: list[Draft] = [DeviceDraft(tokens, 1, 2), (), DeviceDraft(tokens, 0, 1)]
    assert [len(draft) for draft in drafts] == [2, 0, 1]
    assert fetch(winners([5, 6, 4]), drafts) == [5, 6, 4]
    tokens.chosen.zero_()  # the next round's
    assert [token_ids_of(draft) for draft in drafts] == [(12, 22), (), (11,)]
    assert list(drafts[0]) == [Proposal(12), Proposal(22)]


def test_what_could_not_be_drafted_is_read_as_some_token_and_refused_on_the_host() -> None:
    chosen = CHOSEN.clone()
    chosen[1, 1] = -1
    tokens = DeviceTokens(chosen, num_rows=3)
    ids = torch.tensor(references_of(DeviceDraft(tokens, 1, 2)))
    resolve(ids, chosen)
    assert ids.tolist() == [12, 0]
    with pytest.raises(ValueError, match="row 1 of the scores holds a NaN"):
        fetch(winners([5]), [DeviceDraft(tokens, 0, 1)])


def test_what_could_not_be_chosen_is_refused_beside_drafts() -> None:
    tokens = DeviceTokens(CHOSEN, num_rows=3)
    with pytest.raises(ValueError, match="row 0 of the scores holds a NaN"):
        fetch(winners([5, 6], float("nan")), [DeviceDraft(tokens, 0, 1)])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    drafted=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    target=st.lists(st.integers(0, 2), min_size=15, max_size=15),
    gap=st.integers(0, 2),
    seed=st.integers(0, 100),
)
def test_the_device_accepts_as_verification_does(
    lengths: list[int], drafted: list[int], target: list[int], gap: int, seed: int
) -> None:
    """Drafts of other rows and lengths, between choices of others."""
    tokens = DeviceTokens(torch.tensor(drafted).view(4, 3), num_rows=3)
    rows = torch.randperm(3, generator=torch.Generator().manual_seed(seed)).tolist()
    drafts = [DeviceDraft(tokens, row, n) for row, n in zip(rows, lengths, strict=False)]
    starts, chosen = [], []
    for draft in drafts:
        chosen += [9] * gap
        starts.append(len(chosen))
        chosen += target[5 * len(starts) - 5 :][: len(draft) + 1]
    accepted = AcceptedDrafts.of(drafts, starts, torch.tensor(chosen))
    assert accepted is not None
    for i, (draft, start) in enumerate(zip(drafts, starts, strict=True)):
        emitted = accept(draft.token_ids(), chosen[start : start + len(draft) + 1])
        assert int(accepted.counts[i]) == len(emitted) - 1
        assert int(accepted.token_ids[i]) == emitted[-1]


def test_drafts_of_the_host_are_not_judged_on_the_device() -> None:
    drafts: list[Draft] = [DeviceDraft(DeviceTokens(CHOSEN, num_rows=3), 0, 1), ON_HOST]
    assert AcceptedDrafts.of(drafts, [0, 2], torch.zeros(6, dtype=torch.long)) is None
    assert AcceptedDrafts.of([], [], torch.zeros(0, dtype=torch.long)) is None
