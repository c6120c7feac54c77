"""Where rows come from: JSONL in OpenAI's batch format, Parquet, a folder of text files.

Each is read in a stream, in the same order each time, and can be sent to another process.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import IO, Any, Protocol

from pydantic_core import from_json

from magicdec.deployments.batch_files import file_system, opened, reading
from magicdec.deployments.batch_row import CHAT_URL, BatchRow, InputError, parse_row
from magicdec.deployments.settings import SettingsError

MAX_ROW_BYTES = 16 << 20  # as long as the largest body that the server takes
PARQUET_ROWS = 256  # read at a time
_FIELD = re.compile(r"\{(\w+)\}")


class Source(Protocol):
    """`rows` yields what can be read, and an InputError in place of what cannot."""

    @property
    def path(self) -> str: ...

    def rows(self, models: tuple[str, ...]) -> Iterator[BatchRow | InputError]: ...


@dataclass(frozen=True, slots=True)
class Template:
    """Makes a chat body of a text: `{name}` is replaced by the field of that name."""

    text: str
    sampling: dict[str, Any] = field(default_factory=dict)  # max_tokens and such, for the body

    @property
    def fields(self) -> list[str]:
        return _FIELD.findall(self.text)

    def body(self, values: dict[str, Any]) -> dict[str, Any]:
        """Raises KeyError for a field that `values` lacks."""
        prompt = _FIELD.sub(lambda match: str(values[match[1]]), self.text)
        return {"messages": [{"role": "user", "content": prompt}], **self.sampling}


@dataclass(frozen=True, slots=True)
class JsonLines:
    path: str

    def rows(self, models: tuple[str, ...]) -> Iterator[BatchRow | InputError]:
        with opened(self.path) as stream:
            for number in count(1):
                line = stream.readline(MAX_ROW_BYTES + 1)
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.isspace():
                    continue
                place = f"{self.path}:{number}"
                if len(line) > MAX_ROW_BYTES:
                    yield InputError(f"{place}: a line must have at most {MAX_ROW_BYTES:,} bytes")
                    _skip_line(stream)
                else:
                    yield _row(line, place, models)


def _row(line: bytes, place: str, models: tuple[str, ...]) -> BatchRow | InputError:
    try:
        return parse_row(from_json(line, allow_inf_nan=False), place, models)
    except InputError as error:
        return error
    except ValueError as error:
        return InputError(f"{place}: {_why_not_json(line, error)}")


def _why_not_json(line: bytes, error: ValueError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return f"not UTF-8: byte {line[wrong.start]:#04x} at column {wrong.start + 1}"
    return f"not JSON: {str(error).replace(' at line 1 ', ' at ')}"


def _skip_line(stream: IO[bytes]) -> None:
    while True:
        piece = stream.readline(MAX_ROW_BYTES)
        if not piece or piece.endswith(b"\n"):
            return


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """A column `body` (JSON text or a struct) makes a row as a JSONL line does; otherwise the
    template does. `custom_id` is a column, or the row's number."""

    path: str
    template: Template | None

    def rows(self, models: tuple[str, ...]) -> Iterator[BatchRow | InputError]:
        for number, record in enumerate(self._records(), 1):
            place = f"{self.path}, row {number}"
            values = {"custom_id": f"row-{number}", "url": CHAT_URL, **record}
            if isinstance(values["custom_id"], int):
                values["custom_id"] = str(values["custom_id"])
            try:
                values["body"] = self._body(values, place)
                yield parse_row(values, place, models)
            except InputError as error:
                yield error

    def _body(self, values: dict[str, Any], place: str) -> Any:
        if self.template is not None:
            return self.template.body(values)
        body = values["body"]
        if not isinstance(body, str):
            return _without_nulls(body)
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise InputError(f"{place}: body is not JSON: {error}") from error

    def _records(self) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        from pyarrow import parquet

        with opened(self.path, compression=None) as stream, reading(self.path):
            try:
                file = parquet.ParquetFile(stream)
            except pa.ArrowInvalid as error:
                raise InputError(f"{self.path} is not Parquet: {error}") from error
            self._check_columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                yield from batch.to_pylist()

    def _check_columns(self, names: list[str]) -> None:
        wanted = ["body"] if self.template is None else self.template.fields
        missing = [name for name in wanted if name not in names]
        if missing:
            hint = "; or give a --template" if self.template is None else ""
            raise InputError(
                f"{self.path}: there is no column {missing[0]!r}, but {', '.join(names)}{hint}"
            )


def _without_nulls(value: Any) -> Any:
    """A struct has every field of its type: those that a row leaves out come as nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


@dataclass(frozen=True, slots=True)
class TextFolder:
    """Every file of a folder and the folders in it, by name; the template knows {text} and {name}.
    Files whose names begin with a dot are left out."""

    path: str
    template: Template

    def rows(self, models: tuple[str, ...]) -> Iterator[BatchRow | InputError]:
        system, root = file_system(self.path)
        with reading(self.path):
            names = sorted(system.find(root))
        for full in names:
            name = str(full)[len(root) :].lstrip("/")
            if any(part.startswith(".") for part in name.split("/")):
                continue
            place = f"{self.path.rstrip('/')}/{name}"
            try:
                text = self._text(system, str(full), place)
            except InputError as error:
                yield error
                continue
            body = self.template.body({"text": text, "name": name})
            yield parse_row({"custom_id": name, "url": CHAT_URL, "body": body}, place, models)

    def _text(self, system: Any, full: str, place: str) -> str:
        with reading(place), system.open(full, "rb") as stream:
            raw = stream.read(MAX_ROW_BYTES + 1)
        if len(raw) > MAX_ROW_BYTES:
            raise InputError(f"{place}: a file must have at most {MAX_ROW_BYTES:,} bytes")
        try:
            return str(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as wrong:
            where = f"byte {raw[wrong.start]:#04x} at offset {wrong.start}"
            raise InputError(f"{place}: not UTF-8: {where}") from wrong


def open_source(path: str, template: Template | None) -> Source:
    """By what the path is: a folder, *.parquet, or else JSONL. Raises SettingsError."""
    system, name = file_system(path)
    with reading(path):
        if not system.exists(name):
            raise FileNotFoundError(path)
        if system.isdir(name):
            return TextFolder(path, _folder_template(path, template))
    if name.endswith((".parquet", ".pq")):
        return ParquetRows(path, template)
    if template is not None:
        raise SettingsError("--template is for Parquet and folders of text; JSONL rows have bodies")
    return JsonLines(path)


def _folder_template(path: str, template: Template | None) -> Template:
    if template is None:
        raise SettingsError(f"{path} is a folder of texts: say with --template what to ask of each")
    unknown = [name for name in template.fields if name not in ("text", "name")]
    if unknown or "text" not in template.fields:
        wrong = f"{{{unknown[0]}}}" if unknown else "no {text}"
        raise SettingsError(f"--template must hold {{text}}, and may hold {{name}}; got {wrong}")
    return template
