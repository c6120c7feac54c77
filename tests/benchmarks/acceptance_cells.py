"""Cells of the acceptance benchmark: what was run, under which settings, and the file they fill.

The file holds one JSON object a line, {"cell": settings, "result": numbers} or {"run": facts}, and
is only ever appended to, so an interrupted run goes on where it stopped.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicdec.batch import Plan
from magicdec.config import DraftModelConfig, SelectionConfig
from tests.benchmarks.acceptance_tasks import Prompt

PLAIN = "plain"
VIEW_DRAFTERS = ("streaming", "snapkv", "recycled", "top_k")
DRAFTERS = (*VIEW_DRAFTERS, "ngram", "draft_model")
Cell = dict[str, Any]

# Two cores, SmolLM2-135M (docs/benchmarks.md): for a first estimate of a block's time.
_PREFILL_RATE = 300.0  # tokens a second
_READ_SECONDS = 9e-6  # of a verify pass, a sequence and context token
_DRAFT_SECONDS = 0.0125  # a sequence and draft step
_ROUND_TOKENS = 3.5
_SUFFIX_TOKENS = 64  # of a question, prefilled although its context is cached

_WINDOW_FIELDS = ("num_sink_tokens", "num_recent_tokens")
_FIRST_LAYERS_FIELDS = ("num_first_layers", "first_layers_factor")
_RECYCLED_FIELDS = ("refresh_rounds", "chunk_size", "coverage")


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who drafts, how far, over how much. `budget` is None where the drafter has no view."""

    drafter: str
    draft_length: int
    budget: int | None
    selection: SelectionConfig
    draft_model: DraftModelConfig | None = None

    @property
    def plan(self) -> Plan:
        """Drafters without a view are given a budget that none of them reads."""
        drafter = "streaming" if self.drafter == PLAIN else self.drafter
        window = self.selection.num_sink_tokens + self.selection.num_recent_tokens
        return Plan(drafter, self.draft_length, self.budget or window + self.draft_length)

    @property
    def label(self) -> str:
        return self.drafter if self.budget is None else f"{self.drafter} {self.budget}"

    def settings(self) -> Cell:
        """What a cell is known by, of the configuration: only what its drafter reads."""
        settings: Cell = {"drafter": self.drafter, "draft_length": self.draft_length}
        if self.budget is not None:
            fields = list(_WINDOW_FIELDS)
            fields += _FIRST_LAYERS_FIELDS if self.selection.num_first_layers else ()
            fields += _RECYCLED_FIELDS if self.drafter == "recycled" else ()
            settings["budget"] = self.budget
            settings["selection"] = {field: getattr(self.selection, field) for field in fields}
        if self.drafter == "draft_model" and self.draft_model is not None:
            settings["draft_model"] = Path(self.draft_model.path).name
            settings["window"] = self.draft_model.window
            if self.draft_model.window is not None:
                settings["selection"] = {"num_sink_tokens": self.selection.num_sink_tokens}
        return settings


def plain_configuration(selection: SelectionConfig) -> Configuration:
    return Configuration(PLAIN, 0, None, selection)


@dataclass(frozen=True, slots=True)
class Block:
    """Prompts that run together: every configuration sees all of them in one batch.

    `answer_codes` holds what an answer must contain to count, by prompt name, where anything must.
    `warm_up` is prefilled first, so that the prefix cache serves the prompts.
    """

    name: str
    context: int
    num_tokens: int
    temperature: float
    prompts: dict[str, list[Prompt]]  # by task
    warm_up: list[tuple[int, ...]]
    answer_codes: dict[str, str] | None = None

    def cell(self, task: str, configuration: Configuration, model: Cell) -> Cell:
        """`model`: the target's name and dtype."""
        return {
            "block": self.name,
            "task": task,
            "context": self.context,
            "num_tokens": self.num_tokens,
            "temperature": self.temperature,
            "prompts": len(self.prompts[task]),
            **model,
            **configuration.settings(),
        }

    def estimate_seconds(self, configurations: list[Configuration]) -> float:
        """A first guess of what they take on two cores; prompts are prefilled once."""
        num_streams = sum(map(len, self.prompts.values()))
        read = num_streams * self.context * _READ_SECONDS
        seconds = sum(map(len, self.warm_up)) / _PREFILL_RATE
        for c in configurations:
            num_rounds = self.num_tokens / (_ROUND_TOKENS if c.draft_length else 1)
            seconds += num_rounds * (read + num_streams * c.draft_length * _DRAFT_SECONDS)
            if self.answer_codes is not None:
                seconds += num_streams * _SUFFIX_TOKENS / _PREFILL_RATE
        return seconds


class ResultsFile:
    """What has been measured. Raises ValueError for a file with a line that is no result."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: list[dict[str, Any]] = []
        self.cells: list[tuple[Cell, dict[str, Any]]] = []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the run was ended while it wrote
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                self._keep(json.loads(line))
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a result ({error})") from error

    def get(self, cell: Cell) -> dict[str, Any] | None:
        return next((result for known, result in self.cells if known == cell), None)

    def append(self, cell: Cell, result: dict[str, Any]) -> None:
        self._append({"cell": cell, "result": result})

    def append_run(self, facts: dict[str, Any]) -> None:
        self._append({"run": facts})

    def _append(self, row: dict[str, Any]) -> None:
        self._keep(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _keep(self, row: dict[str, Any]) -> None:
        if "run" in row:
            self.runs.append(row["run"])
        else:
            self.cells.append((row["cell"], row["result"]))
