"""Profiles on disk: found again, never believed without reason, and never in the way."""

import json
import logging
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from magicdec.config import DraftModelConfig, EngineConfig, ParallelConfig
from magicdec.cost_model import VERIFY, CostModel
from magicdec.profiling.device_rates import RankDevice
from magicdec.profiling.profile_cache import ProfileKey, cached_profile
from magicdec.profiling.step_profile import PREFILL, StepProfile
from tests.conftest import engine_config
from tests.magicdec.profiling.planted_executor import DEVICE, PLANTED

PROFILE = StepProfile(CostModel(dict(PLANTED)), ((1, -0.001), (4, 0.02)), 40)
OTHER = StepProfile(CostModel({**PLANTED, VERIFY: PLANTED[PREFILL]}), num_shapes=12)
KEY = ProfileKey("0123", "bfloat16", "", "a CPU", "torch-flash-cpu", 1, 2, "{}", "test 1")
KINDS = frozenset(PLANTED)
RANK = RankDevice("a CPU", 2, 4, DEVICE)


def never() -> StepProfile:
    raise AssertionError("measured again")


def store(folder: Path) -> Path:
    assert cached_profile(folder, KEY, KINDS, lambda: PROFILE) is PROFILE
    return folder / KEY.file_name


def test_a_profile_is_found_again(tmp_path: Path) -> None:
    """In a folder that is made where there is none, with nothing but its lock beside it."""
    path = store(tmp_path / "not" / "yet")
    assert cached_profile(path.parent, KEY, KINDS, never) == PROFILE
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize("name", [field.name for field in fields(ProfileKey)])
def test_another_key_is_another_profile(tmp_path: Path, name: str) -> None:
    store(tmp_path)
    number = isinstance(asdict(KEY)[name], int)
    changed: dict[str, Any] = {name: 7 if number else "another"}
    other = replace(KEY, **changed)
    assert cached_profile(tmp_path, other, KINDS, lambda: OTHER) is OTHER
    assert cached_profile(tmp_path, KEY, KINDS, never) == PROFILE


def cost(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["costs"][VERIFY][field] = value

    return change


def everything_free(content: dict[str, Any]) -> None:
    content["costs"][VERIFY] = dict.fromkeys(content["costs"][VERIFY], 0.0)
    content["row_seconds"] = []


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative": (cost("per_row", -1e-3), "StepCost.per_row must be finite and at least 0"),
    "nan": (cost("fixed", float("nan")), "StepCost.fixed must be finite .* got nan"),
    "infinite": (cost("per_kv_byte", float("inf")), "per_kv_byte must be finite"),
    "huge": (cost("fixed", 10**400), "int too large"),
    "text": (cost("fixed", "fast"), "'fast' is not a number"),
    "truth": (cost("fixed", True), "True is not a number"),
    "one field less": (lambda c: c["costs"][VERIFY].pop("weights"), "cost of verify is not made"),
    "one field more": (cost("per_moon", 1.0), "cost of verify is not made of"),
    "one kind less": (lambda c: c["costs"].pop(PREFILL), "no cost of prefill"),
    "no costs": (lambda c: c.pop("costs"), "no costs or no row_seconds"),
    "free": (everything_free, "a step takes no time"),
    "rows out of order": (
        lambda c: c.update(row_seconds=[[4, 0.1], [1, 0.1]]), "row_seconds must ascend"
    ),
    "rows in part": (lambda c: c.update(row_seconds=[[0.5, 0.1]]), "row_seconds holds"),
    "rows that are nan": (lambda c: c.update(row_seconds=[[1, float("nan")]]), "must be finite"),
    "few shapes": (lambda c: c.update(num_shapes=11), "made of 11 shapes, fewer than 12"),
    "no number of shapes": (lambda c: c.pop("num_shapes"), "made of None shapes"),
    "another format": (lambda c: c.update(format=0), "its format is 0"),
    "no format": (lambda c: c.pop("format"), "its format is None"),
    "another machine's": (lambda c: c["key"].update(device="a GPU"), "another one's: .*a GPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_true_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    change, reason = CHANGES[name]
    path = store(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refuses(path, caplog, reason)


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "cut short": (b'{"format": 1, "key": {"mod', "Unterminated string"),
    "binary": (bytes(range(256)), "cannot be read: .*utf-8"),
    "a list": (b"[1, 2]", "it holds a list"),
    "a number": (b"NaN", "it holds a float"),
    "deep": (b"[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_profile_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    content, reason = CONTENTS[name]
    path = store(tmp_path)
    path.write_bytes(content)
    refuses(path, caplog, reason)


def refuses(path: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """One warning that names the file and the reason; the new profile takes the file's place."""
    assert cached_profile(path.parent, KEY, KINDS, lambda: OTHER) is OTHER
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert str(path) in record.getMessage()
    assert "is measured again" in record.getMessage()
    assert re.search(reason, record.getMessage()), record.getMessage()
    assert cached_profile(path.parent, KEY, KINDS, never) == OTHER


def test_a_profile_without_a_kind_that_is_asked_for_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store(tmp_path)
    assert cached_profile(tmp_path, KEY, KINDS | {"draft:new"}, lambda: OTHER) is OTHER
    assert f"profile {path} is measured again: it has no cost of draft:new" in caplog.text


def test_a_profile_of_few_shapes_serves_once_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A busy machine left no time for more; the next start may find it quiet."""
    poor = replace(OTHER, num_shapes=3)
    assert cached_profile(tmp_path, KEY, KINDS, lambda: poor) is poor
    assert "is of 3 shapes, fewer than 12, and may be far off" in caplog.text
    assert cached_profile(tmp_path, KEY, KINDS, lambda: PROFILE) is PROFILE
    assert cached_profile(tmp_path, KEY, KINDS, never) == PROFILE


def test_a_folder_that_cannot_be_written_to_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert cached_profile(blocked / "folder", KEY, KINDS, lambda: PROFILE) is PROFILE
    assert "is not kept" in caplog.text
    assert blocked.read_text() == "in the way"


def test_a_profile_that_fails_leaves_the_folder_usable(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="measured again"):
        cached_profile(tmp_path, KEY, KINDS, never)
    store(tmp_path)


def measure_slowly(folder: Path, marks: Path) -> None:
    def build() -> StepProfile:
        (marks / f"{multiprocessing.current_process().pid}").touch()
        time.sleep(0.5)
        return PROFILE

    assert cached_profile(folder, KEY, KINDS, build) == PROFILE


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    """Two profiles at a time would be of a machine under load."""
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    starters = [
        context.Process(target=measure_slowly, args=(tmp_path / "cache", marks)) for _ in range(3)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(timeout=30)
        assert starter.exitcode == 0
    assert len(list(marks.iterdir())) == 1


def test_a_key_tells_apart_what_changes_step_times(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = engine_config(tiny_model_dir)
    key = ProfileKey.of(config, RANK, "torch-flash-cpu")
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    assert ProfileKey.of(engine_config(copy), RANK, "torch-flash-cpu") == key
    (copy / "config.json").write_text('{"num_hidden_layers": 4}')
    others: list[EngineConfig] = [
        engine_config(copy),
        engine_config(tiny_model_dir, dtype="bfloat16"),
        engine_config(tiny_model_dir, block_size=16),
        engine_config(tiny_model_dir, max_num_seqs=4),
        engine_config(tiny_model_dir, refresh_rounds=5),
        engine_config(tiny_model_dir, verification="optimal_coupling"),
        engine_config(tiny_model_dir, draft_model=DraftModelConfig(str(tiny_model_dir), 64)),
        replace(config, parallel=ParallelConfig(tensor_parallel_size=2)),
    ]
    keys = [ProfileKey.of(other, RANK, "torch-flash-cpu") for other in others]
    keys += [ProfileKey.of(config, replace(RANK, num_threads=3), "torch-flash-cpu")]
    keys += [ProfileKey.of(config, replace(RANK, name="another"), "torch-flash-cpu")]
    keys += [ProfileKey.of(config, RANK, "reference")]
    assert len({key.file_name, *(other.file_name for other in keys)}) == 1 + len(keys)


def test_a_key_does_not_change_with_what_a_request_may_choose(tiny_model_dir: Path) -> None:
    key = ProfileKey.of(engine_config(tiny_model_dir), RANK, "torch-flash-cpu")
    other = engine_config(tiny_model_dir, drafter="recycled", draft_length=3, draft_budget=32)
    assert ProfileKey.of(other, RANK, "torch-flash-cpu") == key
