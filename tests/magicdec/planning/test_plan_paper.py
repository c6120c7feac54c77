"""The plan's step times against MagicDec's tables (arXiv 2408.11049 v5), from data sheets alone.

What a layer of a rank group adds was taken from the draft steps at batch 32; plain steps, verify
passes and every other draft step were not used.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from magicdec.config import SpeculativeConfig
from magicdec.cost_model import expected_tokens, implied_acceptance, speedup
from magicdec.planning.acceptance import default_acceptance
from magicdec.planning.devices import known_device
from magicdec.planning.memory import PlanModel
from magicdec.planning.rounds import DraftSetting, RoundPlanner
from magicdec.roofline import ModelGeometry

LLAMA_31_8B = ModelGeometry(32, 4096, 32, 8, 128, 14336, 128256)
MODELS = {
    "llama-3.1-8b": LLAMA_31_8B,
    "llama-2-7b": ModelGeometry(32, 4096, 32, 32, 128, 11008, 32000),
}
GPUS = {"H100": "h100", "A100": "a100-80g", "L40": "l40"}
BUDGETS = {"streaming": 512, "snapkv": 2049}


@dataclass(frozen=True, slots=True)
class Row:
    """One self-speculating row, times in milliseconds."""

    model: str
    gpu: str
    num_gpus: int
    drafter: str
    context: int
    batch: int
    draft_length: int
    draft_ms: float
    verify_ms: float
    tokens: float
    plain_ms: float
    speedup: float

    @property
    def name(self) -> str:
        return f"{self.model}-{self.num_gpus}x{self.gpu}-{self.context}-{self.batch}-{self.drafter}"

    @property
    def rounds(self) -> RoundPlanner:
        model = PlanModel(self.model, MODELS[self.model])
        device = known_device(GPUS[self.gpu], "bfloat16")
        return RoundPlanner(model, device, self.num_gpus, 16, SpeculativeConfig())

    @property
    def setting(self) -> DraftSetting:
        acceptance = implied_acceptance(self.tokens, self.draft_length)
        return DraftSetting(self.drafter, BUDGETS[self.drafter], acceptance)

    def planned_speedup(self) -> float:
        """At the row's own acceptance and draft length; its draft keeps a cache of its own."""
        rounds, setting = self.rounds, self.setting
        plain = rounds.forward_seconds(self.batch, self.context)
        verify = rounds.forward_seconds(self.batch, self.context, self.draft_length + 1)
        draft = rounds.draft_seconds(setting, self.batch, self.context)
        tokens = expected_tokens(setting.accepts(self.context), self.draft_length)
        return speedup(tokens, self.draft_length, draft / plain, verify / plain)


def read_rows() -> list[Row]:
    path = Path(__file__).parents[1] / "paper_tables.json"
    tables = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name in ("table_1", "table_2", "table_3", "table_6"):
        table = tables[name]
        for values in table["rows"]:
            fields: dict[str, Any] = {
                "model": "llama-3.1-8b",
                **table,
                **dict(zip(table["columns"], values, strict=True)),
            }
            if fields["drafter"] in BUDGETS:
                rows.append(Row(**{key: fields[key] for key in Row.__dataclass_fields__}))
    return rows


ROWS = read_rows()
ON_H100 = [row for row in ROWS if row.gpu == "H100"]


def test_paper_rows_that_the_plan_is_held_to() -> None:
    """All but the four whose draft model runs on a part of the ranks that the paper leaves open."""
    assert len(ROWS) == 26
    assert len(ON_H100) == 17


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_paper_plain_step_and_verify_pass_follow_from_the_data_sheet(row: Row) -> None:
    plain = 1e3 * row.rounds.forward_seconds(row.batch, row.context)
    verify = 1e3 * row.rounds.forward_seconds(row.batch, row.context, row.draft_length + 1)
    assert 0.95 < plain / row.plain_ms < 1.15
    assert 0.85 < verify / row.verify_ms < 1.18


@pytest.mark.parametrize("row", ON_H100, ids=lambda row: row.name)
def test_paper_draft_step_on_h100_follows_from_the_data_sheet(row: Row) -> None:
    """On A100 the paper's drafts grow with the batch as none of its other steps do."""
    draft = 1e3 * row.rounds.draft_seconds(row.setting, row.batch, row.context)
    assert 0.8 <= draft / (row.draft_ms / row.draft_length) < 1.1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_paper_gain_is_below_the_planned_one_by_a_known_margin(row: Row) -> None:
    """docs/planning.md says so. Eq. 2 with the paper's own times is up to 6 % above as well."""
    assert 1.05 < row.planned_speedup() / row.speedup < 1.29


def test_paper_gain_is_met_within_a_seventh_on_the_median() -> None:
    assert statistics.median(row.planned_speedup() / row.speedup for row in ROWS) < 1.14


def test_paper_gains_are_ranked_as_planned() -> None:
    """Within one model, group of GPUs and drafter, what gains more there is planned to gain more,
    wherever the paper's gains are a tenth apart."""
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in ROWS:
        groups.setdefault((row.model, row.gpu, row.num_gpus, row.drafter), []).append(row)
    pairs = [
        (low, high)
        for rows in groups.values()
        for low in rows
        for high in rows
        if high.speedup > 1.1 * low.speedup
    ]
    assert len(pairs) > 30
    assert all(low.planned_speedup() < high.planned_speedup() for low, high in pairs)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_paper_acceptance_is_what_a_plan_expects_by_default(row: Row) -> None:
    expected = default_acceptance(row.drafter, BUDGETS[row.drafter], row.context)
    assert expected == pytest.approx(row.setting.accepts(row.context), abs=0.052)


@pytest.mark.parametrize(
    ("context", "acceptance"),
    [(4096, 0.84), (8192, 0.83), (16384, 0.82), (32768, 0.81), (65536, 0.79), (100000, 0.79)],
)
def test_paper_acceptance_of_streaming_falls_with_the_context(
    context: int, acceptance: float
) -> None:
    """The authors' blog: Llama-3.1-8B, PG-19, 512 positions."""
    assert default_acceptance("streaming", 512, context) == pytest.approx(acceptance, abs=0.01)
