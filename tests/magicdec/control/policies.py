"""Policies as replicas send them, for tests of what becomes of them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from magicdec.acceptance.records import AcceptanceSnapshot, CellCount
from magicdec.control.policy_snapshot import PackedPolicy, PolicySnapshot

Key = tuple[str, float, int, int]  # drafter, budget, context bucket, position


def snapshot(
    examined: float = 10.0,
    accepted: float = 8.0,
    *,
    drafter: str = "recycled",
    budget: float = 512,
    position: int = 1,
    verify: float = 1.0,
) -> PolicySnapshot:
    """Of one cell and one kind of step."""
    cell = CellCount(drafter, budget, 5, position, examined, accepted)
    return PolicySnapshot(AcceptanceSnapshot((cell,)), {"verify": verify}, 1)


def packed(examined: float = 10.0, accepted: float = 8.0, verify: float = 1.0) -> PackedPolicy:
    return PackedPolicy.pack(snapshot(examined, accepted, verify=verify))


def counts(policy: PackedPolicy | None) -> dict[Key, tuple[float, float]]:
    """Examined and accepted drafts by cell; nothing where there is no policy."""
    cells = () if policy is None else policy.unpack().acceptance.cells
    return {
        (c.drafter, c.draft_budget, c.context_bucket, c.position): (c.examined, c.accepted)
        for c in cells
    }


@st.composite
def cells(draw: st.DrawFn) -> tuple[CellCount, ...]:
    keys = st.tuples(
        st.sampled_from(["streaming", "recycled", "ngram"]),
        st.sampled_from([0.25, 256, 1024]),
        st.integers(0, 14),
        st.integers(1, 16),
    )
    examined = st.floats(0.0, 1e6)
    found = []
    for key in draw(st.lists(keys, unique=True, max_size=20)):
        most = draw(examined)
        found.append(CellCount(*key, most, draw(st.floats(0.0, most))))
    return tuple(found)


NAN, INF = math.nan, math.inf
GOOD = packed()


def columns(examined: float, accepted: float) -> PackedPolicy:
    return replace(GOOD, counts=np.array([[examined], [accepted]]))


def cell(setting: int, bucket: int, position: int) -> PackedPolicy:
    return replace(GOOD, cells=np.array([[setting], [bucket], [position]], dtype=np.int16))


def factor(value: Any, kind: Any = "verify") -> PackedPolicy:
    return replace(GOOD, cost_factors=((kind, value),))


TWICE = replace(GOOD, cells=np.tile(GOOD.cells, (1, 2)), counts=np.tile(GOOD.counts, (1, 2)))
# What of it is wrong, as a peer with an error may send it.
FLAWS: list[tuple[Any, str]] = [
    ("nothing of the kind", "must be a PackedPolicy, got a str"),
    (columns(NAN, 1.0), "got 1.0 of nan"),
    (columns(5.0, NAN), "got nan of 5.0"),
    (columns(5.0, 5.1), "got 5.1 of 5.0"),
    (columns(-1.0, -1.0), "got -1.0 of -1.0"),
    (columns(INF, 1.0), "got 1.0 of inf"),
    (columns(1.1e6, 1.0), "at most 1000000"),
    (cell(1, 5, 0), "setting of a cell must be from 0 to 0, got 1"),
    (cell(0, 15, 0), "bucket of a cell must be from 0 to 14, got 15"),
    (cell(0, 5, 16), "position of a cell must be from 0 to 15, got 16"),
    (cell(0, -1, 0), "bucket of a cell must be from 0 to 14, got -1"),
    (TWICE, "every cell must be named once"),
    (replace(GOOD, settings=(("medusa", 512),)), "drafter must be one of"),
    (replace(GOOD, settings=((["recycled"], 512),)), "drafter must be one of"),  # type: ignore
    (replace(GOOD, settings=(("recycled", NAN),)), "draft_budget must be above 0 and finite"),
    (replace(GOOD, settings=(("recycled", INF),)), "draft_budget must be above 0 and finite"),
    (replace(GOOD, settings=(("recycled", -1),)), "draft_budget must be above 0 and finite"),
    (replace(GOOD, settings=(("recycled",),)), "pairs of drafter and draft_budget"),  # type: ignore
    (replace(GOOD, settings=GOOD.settings * 129), "settings must be a tuple of at most 128"),
    (replace(GOOD, counts=GOOD.counts.tolist()), "must be arrays"),
    (replace(GOOD, counts=GOOD.counts.astype(object)), "counts float64, got int16 and object"),
    (replace(GOOD, counts=GOOD.counts[:1]), "counts [2, n], got (3, 1) and (1, 1)"),
    (factor(NAN), "cost factor of verify must be from 0.005 to 200.0, got nan"),
    (factor(0.0), "got 0.0"),
    (factor(201.0), "got 201.0"),
    (factor("1.0"), "got '1.0'"),
    (factor(1.0, kind=7), "pairs of kind and factor"),
    (replace(GOOD, cost_factors=GOOD.cost_factors * 2), "name every kind once"),
    (replace(GOOD, cost_factors=GOOD.cost_factors * 65), "a tuple of at most 64"),
    (replace(GOOD, num_dropped=-1), "num_dropped must be a whole number"),
    (replace(GOOD, num_dropped=NAN), "num_dropped must be a whole number"),  # type: ignore
]
