"""What the prompt of a completion may be. pydantic's own union would report every branch it tried,
and with them the wrong one: each error here names the element that does not fit."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Prompt = str | list[str] | list[int] | list[list[int]]

_SHAPES = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
_JSON_NAMES = {
    bool: "a boolean",
    dict: "an object",
    float: "a number that is no integer",
    int: "an integer",
    list: "an array",
    str: "a string",
    type(None): "null",
}


def check_prompt(prompt: Any) -> Prompt:
    """`type(x) is`, since True is no token id. Raises ValidationError with the element's place."""
    kind = type(prompt)
    if kind is str:
        return str(prompt)
    if kind is not list:
        raise _wrong((), prompt)
    if not prompt:
        raise _wrong((), prompt, found="an empty array")
    first = type(prompt[0])
    for index, element in enumerate(prompt):
        if type(element) is not first or first not in (str, int, list):
            raise _wrong((index,), element)
        if first is list:
            _check_ids(index, element)
    return list(prompt)


def _check_ids(index: int, token_ids: list[Any]) -> None:
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int:
            raise _wrong((index, position), token_id)


def _wrong(place: tuple[int, ...], value: object, found: str | None = None) -> ValidationError:
    found = found or _JSON_NAMES.get(type(value), type(value).__name__)
    message = "prompt must be {shapes}; this is {found}"
    error = PydanticCustomError("prompt_shape", message, {"shapes": _SHAPES, "found": found})
    return ValidationError.from_exception_data(
        "prompt", [InitErrorDetails(type=error, loc=place, input=value)]
    )
