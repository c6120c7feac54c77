"""What all replicas have learnt: sums that leave the asker out, and that nothing absurd moves."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.acceptance.records import AcceptanceSnapshot, CellCount
from magicdec.control.policy_pool import PolicyPool
from magicdec.control.policy_snapshot import PackedPolicy, PolicySnapshot
from tests.magicdec.acceptance.pooling import pool_snapshots
from tests.magicdec.control.policies import FLAWS, cells, counts, packed

SETTLED = 5.0
KEY = ("recycled", 512, 5, 1)
REPLICAS = ("a", "b", "c", "d")
FACTORS = st.dictionaries(st.sampled_from(["verify", "prefill"]), st.floats(0.005, 200.0))
POLICIES = st.builds(PolicySnapshot, st.builds(AcceptanceSnapshot, cells()), FACTORS)


def pool() -> PolicyPool:
    """One that has heard of everybody."""
    return PolicyPool(0.0)


def by_definition(others: Sequence[PolicySnapshot]) -> PolicySnapshot:
    """Counts cell by cell, and medians."""
    kinds = {kind for policy in others for kind in policy.cost_factors}
    return PolicySnapshot(
        pool_snapshots(policy.acceptance for policy in others),
        {k: median(p.cost_factors[k] for p in others if k in p.cost_factors) for k in kinds},
    )


@given(st.lists(st.tuples(st.sampled_from(REPLICAS), POLICIES), max_size=12))
@settings(max_examples=40, deadline=None)
def test_each_gets_what_the_others_said_last(said: list[tuple[str, PolicySnapshot]]) -> None:
    shared, last = pool(), dict[str, PolicySnapshot]()
    for name, policy in said:
        others = by_definition([p for other, p in last.items() if other != name])
        answer = shared.exchange(name, PackedPolicy.pack(policy), SETTLED)
        expected = {k: v for k, v in counts(PackedPolicy.pack(others)).items() if v[0] > 1e-3}
        assert counts(answer) == {k: pytest.approx(v, abs=1e-6) for k, v in expected.items()}
        assert (answer.unpack().cost_factors if answer else {}) == others.cost_factors
        last[name] = policy


@given(st.lists(st.tuples(st.sampled_from(REPLICAS), st.sampled_from(FLAWS)), max_size=12))
@settings(deadline=None)
def test_what_cannot_be_true_never_moves_the_policy(
    wrong: list[tuple[str, tuple[PackedPolicy, str]]],
) -> None:
    shared = pool()
    for name in REPLICAS[:2]:
        shared.exchange(name, packed(), SETTLED)
    for name, (policy, _) in wrong:
        shared.exchange(name, policy, SETTLED)
    assert shared.num_dropped == len(wrong)
    answer = shared.exchange("asks", None, SETTLED)
    assert answer is not None and counts(answer) == {KEY: (20.0, 16.0)}
    assert answer.cost_factors == (("verify", 1.0),)


def test_what_was_dropped_is_warned_of_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    shared = pool()
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            shared.exchange("a", packed(5.0, 6.0), SETTLED)
    assert len(caplog.records) == 7 and "got 6.0 of 5.0" in caplog.text


def test_one_odd_replica_does_not_move_the_cost_factors() -> None:
    shared = pool()
    for i, factor in enumerate((1.1, 1.2, 49.0, 1.3, 1.0)):
        shared.exchange(str(i), packed(verify=factor), SETTLED)
    answer = shared.exchange("asks", None, SETTLED)
    assert answer is not None and answer.cost_factors == (("verify", 1.2),)


def test_a_replica_alone_is_told_nothing() -> None:
    shared = pool()
    for examined in (10.0, 20.0, 30.0):
        assert shared.exchange("a", packed(examined), SETTLED) is None


def test_a_new_replica_is_told_before_it_has_learnt_anything_and_only_then() -> None:
    shared = pool()
    shared.exchange("a", packed(), SETTLED)
    assert counts(shared.exchange("new", None, SETTLED)) == {KEY: (10.0, 8.0)}
    assert shared.exchange("new", None, SETTLED) is None
    assert counts(shared.exchange("new", packed(1.0, 0.0), SETTLED)) == {KEY: (10.0, 8.0)}


def test_what_a_dead_replica_knew_reaches_the_one_that_takes_its_place() -> None:
    shared = pool()
    shared.exchange("dead", packed(), 10.0)
    assert counts(shared.exchange("next", None, 600.0)) == {KEY: (10.0, 8.0)}


def test_what_nobody_has_confirmed_for_long_is_forgotten() -> None:
    shared = pool()
    shared.exchange("dead", packed(), 10.0)
    shared.exchange("alive", packed(3.0, 2.0), 600.0)
    assert len(shared) == 2
    assert counts(shared.exchange("next", None, 610.0)) == {KEY: (3.0, 2.0)}


def test_a_new_pool_hears_of_all_before_it_tells() -> None:
    shared = PolicyPool(100.0)
    for now in (100.1, 101.1, 102.1):
        for name in REPLICAS:
            assert shared.exchange(name, packed(), now) is None
    answer = shared.exchange("a", packed(), 103.1)
    assert counts(answer) == {KEY: (30.0, 24.0)}


def test_settings_that_are_no_more_are_cleared() -> None:
    shared = pool()
    for i in range(20):
        names = tuple(("recycled", 1000.0 * i + tier) for tier in range(1, 101))
        shared.exchange("a", replace(packed(), settings=names), SETTLED)
    answer = shared.exchange("asks", None, SETTLED)
    assert answer is not None and len(answer.settings) <= 1024
    assert counts(answer) == {("recycled", 19001.0, 5, 1): (10.0, 8.0)}


def test_sums_do_not_drift() -> None:
    random = np.random.default_rng(0)
    shared = pool()
    for i in range(5000):
        examined = float(random.uniform(0.0, 1e5))
        shared.exchange(str(i % 7), packed(examined, examined * float(random.random())), SETTLED)
    for i in range(7):
        shared.exchange(str(i), packed(3.0, 2.0), SETTLED)
    assert counts(shared.exchange("asks", None, SETTLED)) == {
        KEY: pytest.approx((21.0, 14.0), abs=1e-6)
    }


def test_a_replica_learns_from_another_through_the_pool() -> None:
    axes = AcceptanceAxes(("recycled", "ngram"), (256, 512))
    veteran, newcomer, shared = AcceptanceModel(axes), AcceptanceModel(axes), pool()
    for _ in range(100):
        veteran.observe("recycled", 512, 5000, 4, 0)
    known = veteran.expected_tokens("recycled", 512, 5000, 4)
    before = newcomer.expected_tokens("recycled", 512, 5000, 4)
    policy = PolicySnapshot(veteran.snapshot(), {})
    shared.exchange("veteran", PackedPolicy.pack(policy), SETTLED)
    answer = shared.exchange("newcomer", None, SETTLED)
    assert answer is not None
    newcomer.merge(answer.unpack().acceptance)
    assert before > 2.0 > 1.2 > known
    assert newcomer.expected_tokens("recycled", 512, 5000, 4) == pytest.approx(known, rel=0.02)


def test_impossible_cells_do_not_reach_a_model_at_all() -> None:
    bad = CellCount("recycled", 512, 5, 1, 5.0, float("nan"))
    shared = pool()
    policy = PackedPolicy.pack(PolicySnapshot(AcceptanceSnapshot((bad,)), {}))
    shared.exchange("a", policy, SETTLED)
    assert shared.exchange("asks", None, SETTLED) is None
