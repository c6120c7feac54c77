"""What comes back of a row: a line for the output, or why there is none yet."""

import logging
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from magicdec.deployments.batch_output import RowResult
from magicdec.deployments.batch_row import BatchRow, RowDefaults
from magicdec.deployments.errors import ApiError, internal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`result` is None for a row that is still to be answered: `is_suspect` where two engines died
    under it and its neighbours, so that it is run again alone; `unreachable` says why nobody could
    be asked for as long as the job waits."""

    result: RowResult | None
    is_suspect: bool = False
    unreachable: str | None = None


async def answer_item(
    item: dict[str, Any],
    defaults: RowDefaults,
    answer: Callable[[BatchRow, str], Awaitable[Outcome]],  # of a row and its key
) -> dict[str, bytes]:
    """Ray Data's hook: a row in, its outcome out. Raises nothing: a row fails alone."""
    row: BatchRow = pickle.loads(item["row"])
    key = row.key(defaults)
    try:
        outcome = await answer(row, key)
    except Exception:
        logger.exception("%s failed", row.place)
        outcome = Outcome(failed(row, key, internal()))
    return {"outcome": pickle.dumps(outcome)}


def failed(row: BatchRow, key: str, error: ApiError) -> RowResult:
    """The format's own error field, with OpenAI's four words and the status."""
    fields = error.body()["error"]
    code = fields.pop("code") or fields["type"]
    return RowResult(
        row.custom_id, key, None, {"code": code, **fields, "status_code": error.status}
    )
