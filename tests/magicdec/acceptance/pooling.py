"""The plain way to pool what replicas saw: the oracle of control/policy_pool.py."""

from collections.abc import Iterable

from magicdec.acceptance.records import AcceptanceSnapshot, CellCount


def pool_snapshots(snapshots: Iterable[AcceptanceSnapshot]) -> AcceptanceSnapshot:
    """The sum of the counts; impossible ones are left out.

    What a replica gets back must not hold its own counts: leave its snapshot out.
    """
    sums: dict[tuple[str, float, int, int], tuple[float, float]] = {}
    cells = (cell for snapshot in snapshots for cell in snapshot.cells)
    for cell in (cell for cell in cells if cell.is_possible()):
        key = (cell.drafter, cell.draft_budget, cell.context_bucket, cell.position)
        examined, accepted = sums.get(key, (0.0, 0.0))
        sums[key] = (examined + cell.examined, accepted + cell.accepted)
    return AcceptanceSnapshot(tuple(CellCount(*key, *counts) for key, counts in sums.items()))
