"""Drafts on the device are read there by reference, and come to the host with what was chosen."""

import pytest
import torch

from magicdec.drafts import (
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
