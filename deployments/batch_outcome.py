"""What comes back of a row: a line for the output, or why there is none yet."""

from dataclasses import dataclass

from magicdec.deployments.batch_output import RowResult
from magicdec.deployments.batch_row import BatchRow
from magicdec.deployments.errors import ApiError


@dataclass(frozen=True, slots=True)
class Outcome:
    """`result` is None for a row that is still to be answered: `is_suspect` where two engines died
    under it and its neighbours, so that it is run again alone; `unreachable` says why nobody could
    be asked for as long as the job waits."""

    result: RowResult | None
    is_suspect: bool = False
    unreachable: str | None = None


def failed(row: BatchRow, key: str, error: ApiError) -> RowResult:
    """The format's own error field, with OpenAI's four words and the status."""
    fields = error.body()["error"]
    code = fields.pop("code") or fields["type"]
    return RowResult(
        row.custom_id, key, None, {"code": code, **fields, "status_code": error.status}
    )
