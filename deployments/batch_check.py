"""The pass over the whole input before anything is started: what cannot be a batch is refused.

What is wrong with the file (not JSON, a missing field, an id twice, another model's name) refuses
the job; what is wrong with one request (a prompt too long, a value out of range) is said here and
fails that row alone. The ids take eight bytes a row, the rows none.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from pydantic import ValidationError

from magicdec.deployments.batch_answered import AnsweredIndex, short_key
from magicdec.deployments.batch_bodies import BodyCheck, parse_body
from magicdec.deployments.batch_row import MAX_LISTED, BatchRow, InputError, RowDefaults, id_hash
from magicdec.deployments.batch_sources import Source
from magicdec.deployments.errors import ApiError, from_request_error, from_validation_error
from magicdec.types import RequestError

MISSING = "missing_required_parameter"


@dataclass(slots=True)
class InputReport:
    """What one pass found. `failing`: the first rows that will fail, with their reasons."""

    num_rows: int = 0
    num_answered: int = 0  # in the output, by the same settings
    num_changed: int = 0  # the output answers their ids, but for another body, model or seed
    first_changed: str = ""
    num_failing: int = 0
    failing: list[str] = field(default_factory=list)


class InputCheck:
    """`body_check`: of the engine that will answer; None where another server does, which knows
    itself what it takes."""

    def __init__(
        self,
        source: Source,
        defaults: RowDefaults,
        answered: AnsweredIndex,
        body_check: BodyCheck | None,
    ) -> None:
        self._source = source
        self._defaults = defaults
        self._answered = answered
        self._body_check = body_check
        self._report = InputReport()
        self._mistakes: list[str] = []
        self._num_mistakes = 0
        self._ids = array("Q")

    def run(self, on_row: Callable[[], None]) -> InputReport:
        """`on_row` is called a row, for the progress. Raises InputError listing the mistakes."""
        for row in self._source.rows(self._defaults.models):
            on_row()
            self._report.num_rows += 1
            if isinstance(row, InputError):
                self._mistake(str(row))
            else:
                self._ids.append(id_hash(row.custom_id))
                self._look_up(row)
                self._check_body(row)
        if self._report.num_rows == 0:
            raise InputError(f"{self._source.path} holds no row")
        for mistake in self._duplicates():
            self._mistake(mistake)
        if self._num_mistakes:
            raise InputError(_listing(self._mistakes, self._num_mistakes))
        return self._report

    def _mistake(self, message: str) -> None:
        self._num_mistakes += 1
        if len(self._mistakes) < MAX_LISTED:
            self._mistakes.append(message)

    def _look_up(self, row: BatchRow) -> None:
        found = self._answered.key_of(row.custom_id)
        if found is None:
            return
        if found == short_key(row.key(self._defaults)):
            self._report.num_answered += 1
        else:
            self._report.num_changed += 1
            self._report.first_changed = self._report.first_changed or row.place

    def _check_body(self, row: BatchRow) -> None:
        if self._body_check is None:
            return
        error = body_error(row, self._body_check)
        if error is None:
            return
        if error.code == MISSING:
            self._mistake(f"{row.place}: body.{error.message}")
            return
        self._report.num_failing += 1
        if len(self._report.failing) < MAX_LISTED:
            self._report.failing.append(f"{row.place}: {error.message}")

    def _duplicates(self) -> Iterator[str]:
        """Equal hashes only say where to look: the ids themselves are read again."""
        ids = np.sort(np.frombuffer(self._ids, np.uint64)) if self._ids else np.empty(0, np.uint64)
        suspected = set(ids[1:][ids[1:] == ids[:-1]].tolist())
        if not suspected:
            return
        seen: dict[str, str] = {}
        for row in self._source.rows(self._defaults.models):
            if isinstance(row, InputError) or id_hash(row.custom_id) not in suspected:
                continue
            first = seen.setdefault(row.custom_id, row.place)
            if first != row.place:
                yield f"{row.place}: custom_id {row.custom_id!r} is that of {first} already"


def body_error(row: BatchRow, check: BodyCheck) -> ApiError | None:
    """Why this row will fail; None: nothing says that it will."""
    try:
        check.check(parse_body(row))
    except ValidationError as error:
        return from_validation_error(error)
    except RequestError as error:
        return from_request_error(error)
    return None


def _listing(mistakes: list[str], num_mistakes: int) -> str:
    if num_mistakes == 1:
        return mistakes[0]
    left = num_mistakes - len(mistakes)
    more = [f"and {left:,} more"] if left else []
    return "\n  ".join([f"{num_mistakes:,} mistakes in the input:", *mistakes, *more])
