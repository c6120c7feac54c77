"""The cost model against MagicDec's own tables (arXiv 2408.11049 v5; paper_tables.json).

30 rows carry times: all of Tables 1, 2 and 6, and those of Table 3 from 32K on.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from magicdec.cost_model import (
    VERIFY,
    CostModel,
    StepCost,
    StepShape,
    best_draft_length,
    draft_kind,
    expected_tokens,
    fit_step_cost,
    implied_acceptance,
    speedup,
)
from magicdec.roofline import Device, ModelGeometry, roofline_cost

LLAMA_8B = ModelGeometry(
    num_layers=32,
    hidden_size=4096,
    num_query_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
)
LLAMA_1B = ModelGeometry(
    num_layers=16,
    hidden_size=2048,
    num_query_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
)
# 80 % of the data sheet's bandwidth and 60 % of its bf16 arithmetic.
DEVICES = {
    "A100": Device(0.8 * 2.039e12, 0.6 * 312e12, 80 << 30, 1e-3),
    "H100": Device(0.8 * 3.35e12, 0.6 * 989e12, 80 << 30, 1e-3),
}
# KV positions of a draft step in Tables 3 and 6.
BUDGETS = {"streaming": 512, "llama-3.2-1b streaming": 512, "snapkv": 2049}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table, times in seconds; draft_seconds is one draft step's."""

    name: str
    gpu: str
    drafter: str
    context: int
    batch: int
    draft_length: int
    draft_seconds: float
    verify_seconds: float
    plain_seconds: float
    tokens: float
    speedup: float

    @property
    def acceptance(self) -> float:
        return implied_acceptance(self.tokens, self.draft_length)

    @property
    def drafter_geometry(self) -> ModelGeometry:
        return LLAMA_1B if self.drafter.startswith("llama-3.2-1b") else LLAMA_8B

    def draft_shape(self) -> StepShape:
        contexts = [BUDGETS[self.drafter]] * self.batch
        return self.drafter_geometry.step_shape([1] * self.batch, contexts)

    def verify_shape(self, draft_length: int) -> StepShape:
        rows, contexts = [draft_length + 1] * self.batch, [self.context] * self.batch
        return LLAMA_8B.step_shape(rows, contexts)


def read_table(name: str) -> list[Row]:
    path = Path(__file__).with_name("paper_tables.json")
    table = json.loads(path.read_text(encoding="utf-8"))[name]
    records: list[dict[str, Any]] = [
        {**table, **dict(zip(table["columns"], values, strict=True))} for values in table["rows"]
    ]
    return [
        Row(
            name="-".join(str(r[k]) for k in ("drafter", "task", "context", "batch") if k in r),
            gpu=r["gpu"],
            drafter=r["drafter"],
            context=r["context"],
            batch=r["batch"],
            draft_length=r["draft_length"],
            draft_seconds=r["draft_ms"] / r["draft_length"] / 1e3,
            verify_seconds=r["verify_ms"] / 1e3,
            plain_seconds=r["plain_ms"] / 1e3,
            tokens=r["tokens"],
            speedup=r["speedup"],
        )
        for r in records
    ]


TABLE_2, TABLE_3, TABLE_6 = (read_table(f"table_{n}") for n in (2, 3, 6))
ALL_ROWS = [*read_table("table_1"), *TABLE_2, *TABLE_3, *TABLE_6]


def fit_verify(rows: list[Row]) -> StepCost:
    """One kind for plain steps and verify passes: they differ in rows alone."""
    shapes = [r.verify_shape(0) for r in rows] + [r.verify_shape(r.draft_length) for r in rows]
    seconds = [r.plain_seconds for r in rows] + [r.verify_seconds for r in rows]
    return fit_step_cost(shapes, seconds, roofline_cost(LLAMA_8B, DEVICES[rows[0].gpu], 8))


def fit_draft(rows: list[Row]) -> StepCost:
    prior = roofline_cost(rows[0].drafter_geometry, DEVICES[rows[0].gpu], 8)
    return fit_step_cost([r.draft_shape() for r in rows], [r.draft_seconds for r in rows], prior)


def by_drafter(rows: list[Row]) -> dict[str, list[Row]]:
    return {r.drafter: [s for s in rows if s.drafter == r.drafter] for r in rows}


def predicted_speedup(model: CostModel, acceptance: float, row: Row) -> float:
    plain = model.seconds(VERIFY, row.verify_shape(0))
    verify = model.seconds(VERIFY, row.verify_shape(row.draft_length))
    draft = model.seconds(draft_kind(row.drafter), row.draft_shape())
    tokens = expected_tokens(acceptance, row.draft_length)
    return speedup(tokens, row.draft_length, draft / plain, verify / plain)


def test_paper_tables_hold_thirty_rows_with_times() -> None:
    assert len(ALL_ROWS) == 30


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda r: f"{r.gpu}-{r.name}")
def test_paper_speedup_follows_from_each_rows_times(row: Row) -> None:
    """Eq. 2; what it leaves out is about 0.7 ms of host work a round, so it is never below."""
    draft_ratio = row.draft_seconds / row.plain_seconds
    verify_ratio = row.verify_seconds / row.plain_seconds
    found = speedup(row.tokens, row.draft_length, draft_ratio, verify_ratio)
    assert 1.0 <= found / row.speedup <= 1.07


HELD_OUT = [
    (TABLE_6, [r for r in TABLE_6 if r.batch <= 64], [r for r in TABLE_6 if r.batch > 64]),
    (
        TABLE_3,
        [r for r in TABLE_3 if r.context <= 32000],
        [r for r in TABLE_3 if r.context > 32000],
    ),
]


@pytest.mark.parametrize(("table", "seen", "unseen"), HELD_OUT, ids=["table_6", "table_3"])
def test_paper_speedup_of_rows_that_the_fit_has_not_seen(
    table: list[Row], seen: list[Row], unseen: list[Row]
) -> None:
    """Batch 128 from batches up to 64; 64K and 100K from 32K. Acceptance is that of the seen."""
    assert len(seen) + len(unseen) == len(table)
    kinds = {draft_kind(name): fit_draft(rows) for name, rows in by_drafter(seen).items()}
    model = CostModel({VERIFY: fit_verify(seen), **kinds})
    acceptance = {
        name: statistics.mean(r.acceptance for r in rows) for name, rows in by_drafter(seen).items()
    }
    errors = {
        r.name: predicted_speedup(model, acceptance[r.drafter], r) / r.speedup - 1.0 for r in unseen
    }
    assert len(errors) == 3
    assert max(abs(e) for e in errors.values()) < 0.12, errors


def predicted_rates(row: Row, verify: StepCost) -> list[float]:
    """Tokens a second of one sequence, for draft lengths 0 to 16."""
    return [
        expected_tokens(row.acceptance, n)
        / (n * row.draft_seconds + verify.seconds(row.verify_shape(n)))
        for n in range(17)
    ]


# Eq. 1 and the row's own times put 8 first here, and 9 even if verifying a draft token were free
# (below). The paper reports 11, where the predicted rate is 2 to 3 % lower than at 8.
TOO_LONG = {"snapkv-qa_1-100000-41", "snapkv-cwe-100000-41"}


@pytest.fixture(scope="module")
def verify_cost() -> StepCost:
    """T_V by draft length: the step-time model fitted on every T_AR and T_V of 8 H100."""
    return fit_verify([*TABLE_2, *TABLE_6])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            r,
            id=r.name,
            marks=[pytest.mark.xfail(reason="predicted 8, the paper reports 11")]
            if r.name in TOO_LONG
            else [],
        )
        for r in [*TABLE_2, *TABLE_6]
    ],
)
def test_paper_draft_length_is_within_one_of_the_best(row: Row, verify_cost: StepCost) -> None:
    verify = [verify_cost.seconds(row.verify_shape(n)) for n in range(17)]
    assert abs(best_draft_length(row.acceptance, row.draft_seconds, verify) - row.draft_length) <= 1


@pytest.mark.parametrize("row", [*TABLE_2, *TABLE_6], ids=lambda r: r.name)
def test_paper_draft_length_loses_little_of_the_predicted_rate(
    row: Row, verify_cost: StepCost
) -> None:
    """The optimum is flat: lengths that differ by three differ by 3 % in speed."""
    rates = predicted_rates(row, verify_cost)
    assert rates[row.draft_length] >= 0.965 * max(rates)


@pytest.mark.parametrize("row", [r for r in TABLE_2 if r.name in TOO_LONG], ids=lambda r: r.name)
def test_paper_draft_length_of_eleven_is_beyond_eq_4(row: Row) -> None:
    """T_V at its value for 11 from the first draft on favours long drafts as much as any T_V may
    that does not fall with the length, and still the best is 9."""
    verify = [row.plain_seconds] + [row.verify_seconds] * 16
    assert best_draft_length(row.acceptance, row.draft_seconds, verify) == 9


def test_verify_cost_of_the_paper_fits_its_step_times(verify_cost: StepCost) -> None:
    for row in [*TABLE_2, *TABLE_6]:
        for length, measured in ((0, row.plain_seconds), (row.draft_length, row.verify_seconds)):
            assert verify_cost.seconds(row.verify_shape(length)) == pytest.approx(
                measured, rel=0.05
            )
