"""The body's `speculation`: "off", or an object of three optional fields. Only its shape is judged
here; draft_choice.py knows the limits. No pydantic union, which would report every branch."""

import json
import math
from typing import Any, LiteralString

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from magicdec.types import SpeculationParams

OFF = "off"
FIELDS = ("drafter", "draft_length", "draft_budget")
MAX_INTEGER = 2**63 - 1
_MAX_SHOWN = 40  # characters of a value that an error repeats: it may be anything


def check_speculation_shape(speculation: Any) -> SpeculationParams | None:
    """Null is absent, as a whole and in each field. Raises ValidationError with the field's place,
    its value and what it must be."""
    if speculation is None:
        return None
    if speculation == OFF:
        return SpeculationParams(enabled=False)
    if type(speculation) is not dict:
        raise _wrong((), f'must be "{OFF}" or an object with {_fields()}', speculation)
    for name in speculation:
        if name not in FIELDS:
            shown = _shown(name)
            message = f"speculation takes {_fields()}, got the field {shown}"
            raise _error((name[:_MAX_SHOWN],), "extra_forbidden", message)
    return SpeculationParams(
        drafter=_drafter(speculation.get("drafter")),
        draft_length=_draft_length(speculation.get("draft_length")),
        draft_budget=_draft_budget(speculation.get("draft_budget")),
    )


def _drafter(value: Any) -> str | None:
    if value is None or type(value) is str:
        return value
    raise _wrong(("drafter",), "must be a string", value)


def _draft_length(value: Any) -> int | None:
    """`type(x) is`, since True is no length."""
    if value is None or (type(value) is int and abs(value) <= MAX_INTEGER):
        return value
    raise _wrong(("draft_length",), "must be an integer of 64 bits", value)


def _draft_budget(value: Any) -> float | None:
    """64.0 is 64, as JSON sees it."""
    if value is None or (type(value) is int and abs(value) <= MAX_INTEGER):
        return value
    if type(value) is float and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) <= MAX_INTEGER else value
    raise _wrong(("draft_budget",), "must be a number of KV positions or a share below 1", value)


def _fields() -> str:
    return f"{', '.join(FIELDS[:-1])} and {FIELDS[-1]}"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        cut = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
        return json.dumps(cut, ensure_ascii=not cut.isprintable())
    shown = json.dumps(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _wrong(place: tuple[str, ...], rule: str, value: object) -> ValidationError:
    return _error(place, "speculation_shape", f"{rule}, got {_shown(value)}")


def _error(place: tuple[str, ...], kind: LiteralString, message: str) -> ValidationError:
    """The message is no template: it may hold braces."""
    error = PydanticCustomError(kind, "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "speculation", [InitErrorDetails(type=error, loc=place, input=None)]
    )
