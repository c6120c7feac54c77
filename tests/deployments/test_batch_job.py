"""A batch job over answers that cost nothing: what is in the output after whatever happened."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.deployments.batch_answered import AnsweredIndex, OutputError, read_output
from magicdec.deployments.batch_manifest import manifest_path
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_output import JobStopped, OutputFile
from magicdec.deployments.batch_sources import JsonLines
from magicdec.deployments.settings import SettingsError
from tests.deployments.batch_rows import (
    MANIFEST,
    answer,
    answers_all,
    completion,
    left,
    read_lines,
    run_job,
    write_jsonl,
)

IDS = [f"row-{i}" for i in range(7)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [completion(name) for name in IDS])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def ids_of(path: Path) -> list[str]:
    return [line["custom_id"] for line in read_lines(path)]


def test_lines_are_openais(rows: Path, output: Path) -> None:
    run_job(rows, output, answers_all(JsonLines(str(rows)), failing=("row-3",)))
    lines = {line["custom_id"]: line for line in read_lines(output)}
    assert sorted(lines) == IDS
    for name, line in lines.items():
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert (line["response"] is None) == (name == "row-3")
        assert (line["error"] is None) == (name != "row-3")


def test_a_second_run_does_nothing(rows: Path, output: Path) -> None:
    run_job(rows, output)
    before = output.read_bytes()

    def nobody(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        raise AssertionError("nothing is left to ask")

    run_job(rows, output, nobody)
    assert output.read_bytes() == before


@settings(deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_run_cut_at_any_byte_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    rows = write_jsonl(folder / "in.jsonl", [completion(name) for name in IDS])
    output = folder / "out.jsonl"
    run_job(rows, output)
    whole = output.read_bytes()
    os.truncate(output, min(cut, len(whole)))
    run_job(rows, output)
    assert output.read_bytes() == whole


def test_a_job_stopped_at_each_row_ends_with_each_id_once(rows: Path, output: Path) -> None:
    def one_then_stop(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        yield Outcome(answer(next(left(JsonLines(str(rows)), answered))))
        yield Outcome(None, unreachable="the engines are gone")

    for _ in IDS[:-1]:
        with pytest.raises(JobStopped, match="gone"):
            run_job(rows, output, one_then_stop)
    run_job(rows, output)
    assert ids_of(output) == IDS


def test_a_row_that_comes_twice_is_written_once(rows: Path, output: Path) -> None:
    def twice(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        for row in left(JsonLines(str(rows)), answered):
            yield Outcome(answer(row))
            yield Outcome(answer(row))

    run_job(rows, output, twice)
    assert ids_of(output) == IDS


def test_rows_that_ray_lost_are_asked_again(rows: Path, output: Path) -> None:
    def loses(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        for row in left(JsonLines(str(rows)), answered):
            if alone or row.custom_id != "row-2":
                yield Outcome(answer(row))

    run_job(rows, output, loses)
    assert sorted(ids_of(output)) == IDS


def test_what_kills_engines_is_run_alone_and_fails_alone(rows: Path, output: Path) -> None:
    def deadly(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        for row in left(JsonLines(str(rows)), answered):
            live_with_it = not alone and row.custom_id in ("row-1", "row-2", "row-3")
            if live_with_it:
                yield Outcome(None, is_suspect=True)
            else:
                yield Outcome(answer(row, is_error=row.custom_id == "row-2"))

    job = run_job(rows, output, deadly)
    errors = [line["custom_id"] for line in read_lines(output) if line["error"]]
    assert errors == ["row-2"] and job.num_errors == 1
    assert sorted(ids_of(output)) == IDS


def test_a_job_that_gets_nowhere_stops(rows: Path, output: Path) -> None:
    with pytest.raises(JobStopped, match="7 rows came back without an answer"):
        run_job(rows, output, lambda answered, alone: iter(()))
    assert not output.exists() and not manifest_path(output).exists()


def test_errors_are_kept_unless_they_are_retried(rows: Path, output: Path) -> None:
    source = JsonLines(str(rows))
    run_job(rows, output, answers_all(source, failing=("row-0", "row-5")))
    assert run_job(rows, output).num_errors == 2
    assert run_job(rows, output, retry_errors=True).num_errors == 0
    assert sorted(ids_of(output)) == IDS
    assert not any(line["error"] for line in read_lines(output))


def test_settings_that_differ_are_refused(rows: Path, output: Path) -> None:
    run_job(rows, output)
    before = output.read_bytes()
    manifest_path(output).write_text("{")
    with pytest.raises(OutputError, match=r"manifest\.json is not a manifest of this command"):
        run_job(rows, output)
    run_job(rows, output, force=True)
    other = replace(MANIFEST, answers={**MANIFEST.answers, "dtype": "bfloat16"})
    with pytest.raises(OutputError, match="dtype was 'float32', now 'bfloat16'"):
        run_job(rows, output, manifest=other)
    assert output.read_bytes() == before
    run_job(rows, output, manifest=other, force=True)
    assert output.read_bytes() == before
    run_job(rows, output, manifest=other)


def test_a_changed_body_is_refused_and_answered_again_by_force(rows: Path, output: Path) -> None:
    run_job(rows, output)
    changed = [completion(name, "another" if name == "row-4" else "once upon a time")
               for name in IDS]  # fmt: skip
    write_jsonl(rows, changed)
    with pytest.raises(OutputError, match=r"answers 1 rows .* the first .*in\.jsonl:5"):
        run_job(rows, output)
    old = {line["custom_id"]: line["id"] for line in read_lines(output)}
    run_job(rows, output, force=True)
    new = {line["custom_id"]: line["id"] for line in read_lines(output)}
    assert sorted(ids_of(output)) == IDS
    assert [name for name in IDS if old[name] != new[name]] == ["row-4"]


def test_an_output_of_another_input_is_refused(rows: Path, output: Path) -> None:
    run_job(rows, output)
    write_jsonl(rows, [completion(name) for name in IDS[:5]])
    with pytest.raises(OutputError, match=r"answers 2 rows that .*in\.jsonl has not"):
        run_job(rows, output)
    assert ids_of(output) == IDS


@pytest.mark.parametrize("content", [b"my notes\n", b"no end of line", b'{"a": 1}\n'])
def test_a_file_that_is_not_ours_is_left_alone(rows: Path, output: Path, content: bytes) -> None:
    output.write_bytes(content)
    with pytest.raises(OutputError, match=r"has no out\.jsonl\.manifest\.json beside it"):
        run_job(rows, output)
    assert output.read_bytes() == content


def test_a_broken_line_is_named(rows: Path, output: Path) -> None:
    run_job(rows, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:2], b"{broken}\n", *lines[3:]]))
    with pytest.raises(OutputError, match=r"out\.jsonl:3: not a line that this command wrote"):
        run_job(rows, output)
    output.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(OutputError, match="lines 2 and 8 both answer 'row-1'"):
        run_job(rows, output)


def test_a_second_writer_is_refused(rows: Path, output: Path) -> None:
    holder = OutputFile(output)
    with pytest.raises(OutputError, match="is being written by another run"):
        run_job(rows, output)
    holder.close()
    run_job(rows, output)


def test_a_compacted_output_is_still_held(rows: Path, output: Path) -> None:
    run_job(rows, output)
    holder = OutputFile(output)
    holder.keep(lambda line: line.custom_id != "row-0")
    with pytest.raises(OutputError, match="another run"):
        OutputFile(output)
    holder.close()
    assert ids_of(output) == IDS[1:]


@pytest.mark.parametrize("place", ["folder", "no/such/out.jsonl", "in.jsonl"])
def test_an_output_that_cannot_be_written_is_refused(
    rows: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    before = rows.read_bytes()
    with pytest.raises(SettingsError, match=r"cannot write|is the input"):
        run_job(rows, tmp_path / place)
    assert rows.read_bytes() == before


def test_a_device_is_no_output(rows: Path) -> None:
    with pytest.raises(SettingsError, match="not a file that may be read and written"):
        run_job(rows, Path("/dev/null"))


def test_a_torn_line_is_seen(rows: Path, output: Path) -> None:
    run_job(rows, output)
    whole = output.stat().st_size
    with output.open("ab") as file:
        file.write(json.dumps({"id": "batch_req_00"}).encode())
    state = read_output(output)
    assert state.end == whole < state.size
    run_job(rows, output)
    assert output.stat().st_size == whole
