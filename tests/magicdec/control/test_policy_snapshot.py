"""What a replica has learnt, packed and unpacked, and what of it cannot be true."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.acceptance.records import AcceptanceSnapshot, CellCount
from magicdec.control.policy_snapshot import PackedPolicy, PolicySnapshot, find_policy_flaw
from tests.magicdec.control.policies import FLAWS, cells, packed, snapshot


@given(cells(), st.dictionaries(st.text(max_size=8), st.floats(0.005, 200.0), max_size=4))
def test_what_is_packed_is_unpacked_and_has_no_flaw(
    found: tuple[CellCount, ...], factors: dict[str, float]
) -> None:
    policy = PolicySnapshot(AcceptanceSnapshot(found), factors, 3)
    sent: PackedPolicy = pickle.loads(pickle.dumps(PackedPolicy.pack(policy)))
    assert find_policy_flaw(sent) is None
    assert sent.unpack() == policy
    assert sent.says_the_same(PackedPolicy.pack(policy))


@pytest.mark.parametrize(
    "changed",
    [
        snapshot(11.0),
        snapshot(accepted=7.0),
        snapshot(drafter="ngram"),
        snapshot(budget=256),
        snapshot(position=2),
        snapshot(verify=1.1),
    ],
)
def test_what_differs_is_not_the_same(changed: PolicySnapshot) -> None:
    assert not PackedPolicy.pack(changed).says_the_same(packed())


def test_a_thousand_cells_are_some_tens_of_kilobytes() -> None:
    many = tuple(
        CellCount("recycled", budget, bucket, position, 9.0, 5.0)
        for budget in range(100, 105)
        for bucket in range(14)
        for position in range(1, 17)
    )
    policy = PackedPolicy.pack(PolicySnapshot(AcceptanceSnapshot(many), {}))
    assert len(pickle.dumps(policy)) < 24 * len(many) + 1000


@pytest.mark.parametrize(("wrong", "message"), FLAWS, ids=[message for _, message in FLAWS])
def test_what_cannot_be_true_is_named(wrong: Any, message: str) -> None:
    assert find_policy_flaw(packed()) is None
    assert message in str(find_policy_flaw(wrong))
