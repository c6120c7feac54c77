"""One batch: check all, start the engines, write each answer as it comes, go on after anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from magicdec.deployments.batch_answered import (
    Answered,
    AnsweredIndex,
    AnsweredLine,
    OutputError,
    OutputState,
    read_output,
)
from magicdec.deployments.batch_bodies import BodyCheck
from magicdec.deployments.batch_check import InputCheck, InputReport
from magicdec.deployments.batch_files import check_can_be_written
from magicdec.deployments.batch_manifest import Manifest, check_manifest, manifest_path
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_output import JobStopped, OutputFile
from magicdec.deployments.batch_progress import Figures, ProgressView
from magicdec.deployments.batch_row import InputError, RowDefaults
from magicdec.deployments.batch_sources import Source

MAX_PASSES = 4  # over the rows that are left; each but the first runs one row at a time

# (what is answered, one row at a time?) -> what becomes of the other rows
Answerer = Callable[[AnsweredIndex, bool], Iterator[Outcome]]


@dataclass(frozen=True, slots=True)
class JobRules:
    """What the user allows. `force`: an output of other settings; `strict`: no row may fail."""

    retry_errors: bool = False
    force: bool = False
    strict: bool = False


class BatchJob:
    """Holds the output from `opened` to its end: no second run writes there."""

    def __init__(
        self,
        source: Source,
        output: OutputFile,
        path: Path,
        defaults: RowDefaults,
        manifest: Manifest,
        rules: JobRules,
    ) -> None:
        self.num_errors = 0  # in the output
        self.report = InputReport()
        self._source = source
        self._output = output
        self._path = path
        self._defaults = defaults
        self._manifest = manifest
        self._rules = rules
        self._state = OutputState(Answered(), 0, 0, 0)

    def check(self, body_check: BodyCheck | None, on_row: Callable[[], None]) -> InputReport:
        """Reads output and input whole, and changes nothing. Raises OutputError, InputError."""
        check_manifest(self._path, self._manifest, force=self._rules.force)
        self._state = read_output(self._path)
        answered = self._state.answered.freeze()
        check = InputCheck(self._source, self._defaults, answered, body_check)
        self.report = report = check.run(on_row)
        if self._rules.strict and report.num_failing:
            raise InputError("\n  ".join(failing_lines(report)))
        unknown = len(answered) - report.num_answered - report.num_changed
        if unknown and not self._rules.force:
            raise OutputError(
                f"{self._path} answers {unknown:,} rows that {self._source.path} has not: choose "
                "another output, or --force to keep them"
            )
        if report.num_changed and not self._rules.force:
            raise OutputError(
                f"{self._path} answers {report.num_changed:,} rows as they were with another body, "
                f"model or seed, the first {report.first_changed}: choose another output, or "
                "--force to answer them again"
            )
        return report

    def prepare(self) -> Figures:
        """Makes the output ready to be appended to; what is left to answer is in the figures."""
        self._output.cut_torn_line(self._state)
        num_answered = self.report.num_answered
        if (self._rules.retry_errors and self._state.num_errors) or self.report.num_changed:
            self._output.keep(self._keeper())
            self._state = read_output(self._path)
            num_answered = self._count_answered()
        self._manifest.write(manifest_path(self._path))
        self.num_errors = self._state.num_errors
        return Figures(self.report.num_rows, num_answered)

    def _keeper(self) -> Callable[[AnsweredLine], bool]:
        """Which lines stay: not errors that are tried again, nor answers of rows that changed."""
        changed: set[str] = set()
        if self.report.num_changed:
            index = self._state.answered.freeze()
            for row in self._source.rows(self._defaults.models):
                if isinstance(row, InputError) or index.key_of(row.custom_id) is None:
                    continue
                if not index.has(row.custom_id, row.key(self._defaults)):
                    changed.add(row.custom_id)
        retried = self._rules.retry_errors
        return lambda line: line.custom_id not in changed and not (retried and line.is_error)

    def _count_answered(self) -> int:
        index = self._state.answered.freeze()
        return sum(
            index.has(row.custom_id, row.key(self._defaults))
            for row in self._source.rows(self._defaults.models)
            if not isinstance(row, InputError)
        )

    def run(self, answerer: Answerer, view: ProgressView, figures: Figures) -> None:
        """Answers what is left. Raises JobStopped.

        A first pass runs many rows at a time. What it leaves, rows under which two engines died, is
        run one at a time: only the row that kills engines fails for it.
        """
        for number in range(MAX_PASSES):
            if not figures.num_left:
                return
            self._pass(answerer, view, alone=number > 0)
        if figures.num_left:
            raise JobStopped(f"{figures.num_left:,} rows came back without an answer")

    def _pass(self, answerer: Answerer, view: ProgressView, *, alone: bool) -> None:
        answered = self._state.answered
        written: set[str] = set()
        for outcome in answerer(answered.freeze(), alone):
            if outcome.unreachable is not None:
                raise JobStopped(outcome.unreachable)
            result = outcome.result
            if result is None or result.key in written:  # Ray ran it twice: the answers are equal
                continue
            self._output.append(result)
            written.add(result.key)
            answered.add(result.custom_id, result.key)
            self.num_errors += result.error is not None
            view.add(result)


@contextmanager
def opened(
    source: Source, path: Path, defaults: RowDefaults, manifest: Manifest, rules: JobRules
) -> Iterator[BatchJob]:
    """The job with its output held. A file that was made for it and got no line is removed.

    Raises SettingsError, OutputError.
    """
    check_can_be_written(path)
    if path.exists() and Path(source.path).exists() and path.samefile(source.path):
        raise OutputError(f"{path} is the input; choose another output")
    is_new = not path.exists()
    output = OutputFile(path)
    try:
        yield BatchJob(source, output, path, defaults, manifest, rules)
    finally:
        output.close()
        if is_new and path.stat().st_size == 0:
            path.unlink()
            manifest_path(path).unlink(missing_ok=True)


def failing_lines(report: InputReport) -> list[str]:
    """What was found of single requests, for people."""
    left = report.num_failing - len(report.failing)
    more = [f"and {left:,} more"] if left else []
    rows = "row" if report.num_failing == 1 else "rows"
    return [f"{report.num_failing:,} {rows} will fail:", *report.failing, *more]
