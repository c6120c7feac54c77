"""One row of a batch: OpenAI's batch line, checked as far as every row of any input must be."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from magicdec.deployments.settings import SettingsError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

MAX_LISTED = 20  # mistakes that one message names


class InputError(SettingsError):
    """What is wrong in the input, with its place: one line a mistake."""


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """What a row is given where it says nothing.

    `models`: the names of those that answer; where there is one, rows may leave it out. `seed`: of
    the rows whose bodies have none.
    """

    models: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A request and where it stands. `body` names its model and is otherwise as it was read."""

    place: str
    custom_id: str
    url: str
    body: dict[str, Any]

    def key(self, defaults: RowDefaults) -> str:
        """32 hex digits that stand for all that its answer depends on: two rows of one key have
        the same answer."""
        parts = [self.custom_id, self.url, self.body, defaults.seed]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return blake2b(text.encode(), digest_size=16).hexdigest()


def row_seed(key: str) -> int:
    """The seed of a row without one: the same each time it is run, and another for each row."""
    return int(key[:12], 16)  # 48 bits: any JSON reader keeps them


def id_hash(custom_id: str) -> int:
    """64 bits, to hold millions of ids in memory."""
    return int.from_bytes(blake2b(custom_id.encode(), digest_size=8).digest(), "little")


def parse_row(record: object, place: str, models: tuple[str, ...]) -> BatchRow:
    """A line of the batch format; fields that it does not have are ignored, as by OpenAI.

    `models`: as in RowDefaults. Raises InputError.
    """
    if not isinstance(record, dict):
        raise InputError(f"{place}: a row must be a JSON object, got {_kind(record)}")
    custom_id = _field(record, "custom_id", place, str, "a string")
    if not custom_id:
        raise InputError(f"{place}: custom_id must not be empty")
    method = record.get("method", "POST")
    if method != "POST":
        raise InputError(f"{place}: method must be POST, got {method!r}")
    url = _field(record, "url", place, str, "a string")
    if url not in URLS:
        raise InputError(f"{place}: url must be {' or '.join(URLS)}, got {url!r}")
    body = _field(record, "body", place, dict, "an object")
    return BatchRow(place, custom_id, url, _with_model(body, place, models))


def _with_model(body: dict[str, Any], place: str, models: tuple[str, ...]) -> dict[str, Any]:
    named = body.get("model")
    if named in models:
        return body
    if named is None and len(models) == 1:
        return {**body, "model": models[0]}
    if named is None:
        raise InputError(f"{place}: body.model is missing, and must be one of {', '.join(models)}")
    served = " or ".join(map(repr, models))
    raise InputError(f"{place}: body.model must be {served}, which answers here, got {named!r}")


def _field(record: dict[str, Any], name: str, place: str, kind: type, wanted: str) -> Any:
    if name not in record:
        raise InputError(f"{place}: {name} is missing")
    value = record[name]
    if type(value) is not kind:
        raise InputError(f"{place}: {name} must be {wanted}, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def prompt_text(body: dict[str, Any], limit: int | None = None) -> str:
    """The prompt's text, or its first `limit` characters; "" of a body that has none. For
    measuring and comparing only: what is wrong in the body is somebody else's to say."""
    pieces: list[str] = []
    messages = body.get("messages")
    contents = [body.get("prompt")]
    if isinstance(messages, list):
        contents = [m.get("content") for m in messages if isinstance(m, dict)]
    for content in contents:
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                pieces.append(text)
            elif isinstance(text, int | list):  # token ids
                pieces.append(repr(text))
        if limit is not None and sum(map(len, pieces)) >= limit:
            break
    return "\n".join(pieces)[:limit]
