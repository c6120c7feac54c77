"""The check of a batch's input: what each mistake is told as, and what only fails its row."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from magicdec.config import SpeculativeConfig
from magicdec.deployments.batch_answered import Answered
from magicdec.deployments.batch_bodies import MAX_CHOICES, BodyCheck, PromptLimits
from magicdec.deployments.batch_check import InputCheck, InputReport
from magicdec.deployments.batch_row import InputError, RowDefaults
from magicdec.deployments.batch_sources import (
    MAX_ROW_BYTES,
    JsonLines,
    ParquetRows,
    Source,
    Template,
    open_source,
)
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.settings import SettingsError
from tests.conftest import VOCAB_SIZE, byte_tokenizer
from tests.deployments.batch_rows import (
    DEFAULTS,
    MODEL,
    chat,
    completion,
    good_rows,
    write_jsonl,
)

CONTEXT = 128


def builder() -> PromptBuilder:
    return PromptBuilder(
        byte_tokenizer(),
        max_model_len=CONTEXT,
        vocab_size=VOCAB_SIZE,
        max_choices=MAX_CHOICES,
        speculation=SpeculativeConfig(),
    )


def body_check() -> BodyCheck:
    limits = PromptLimits(CONTEXT, template_bytes=40)
    return BodyCheck(builder, limits, SpeculativeConfig())


def check(source: Source, bodies: BodyCheck | None = None) -> InputReport:
    return InputCheck(source, DEFAULTS, Answered().freeze(), bodies or body_check()).run(
        lambda: None
    )


def check_lines(tmp_path: Path, *records: object) -> InputReport:
    return check(JsonLines(str(write_jsonl(tmp_path / "in.jsonl", records))))


GOOD = completion("a")


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b'{"custom_id": "b"', "in.jsonl:2: not JSON: EOF while parsing an object"),
        (b'{"custom_id": "\xff"}', "in.jsonl:2: not UTF-8: byte 0xff at column 16"),
        (json.dumps(GOOD).encode("utf-16"), "in.jsonl:2: not UTF-8: byte 0xff at column 1"),
        (b'{"custom_id": NaN}', "in.jsonl:2: not JSON"),
        ([1, 2], "in.jsonl:2: a row must be a JSON object, got an array"),
        (without("custom_id"), "in.jsonl:2: custom_id is missing"),
        (without("url"), "in.jsonl:2: url is missing"),
        (without("body"), "in.jsonl:2: body is missing"),
        ({**GOOD, "custom_id": 7}, "custom_id must be a string, got a number"),
        ({**GOOD, "custom_id": ""}, "custom_id must not be empty"),
        ({**GOOD, "method": "GET"}, "method must be POST, got 'GET'"),
        ({**GOOD, "url": "/v1/embeddings"}, "url must be /v1/chat/completions or /v1/completions"),
        ({**GOOD, "body": "text"}, "body must be an object, got a string"),
        (
            completion("b", model="gpt-4"),
            "body.model must be 'tiny', which answers here, got 'gpt-4'",
        ),
        ({**GOOD, "custom_id": "b", "body": {"max_tokens": 4}}, "in.jsonl:2: body.prompt: Field"),
        (GOOD, "in.jsonl:2: custom_id 'a' is that of "),
        (b"x" * (MAX_ROW_BYTES + 5), "in.jsonl:2: a line must have at most 16,777,216 bytes"),
    ],
)
def test_a_mistake_of_the_file_is_told_with_its_line(
    tmp_path: Path, record: object, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_lines(tmp_path, GOOD, record, completion("c"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    bad = [without("url") for _ in range(50)]
    with pytest.raises(InputError) as caught:
        check_lines(tmp_path, *bad)
    lines = str(caught.value).splitlines()
    assert lines[0] == "50 mistakes in the input:"
    assert lines[1].endswith("in.jsonl:1: url is missing") and lines[-1] == "  and 30 more"


def test_every_duplicate_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_lines(tmp_path, completion("a"), completion("b"), completion("a"), completion("a"))
    assert str(caught.value).count("is that of ") == 2
    assert all(f"in.jsonl:{line}: " in str(caught.value) for line in (3, 4))


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"in\.jsonl holds no row"):
        check(JsonLines(str(path)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (completion("b", "x" * 121), "maximum context length is 128 tokens"),
        (chat("b", "x" * 121), "maximum context length is 128 tokens"),
        (completion("b", max_tokens=125), "maximum context length is 128 tokens"),
        (completion("b", temperature=-1), "temperature must be between 0.0 and 100.0, got -1"),
        (completion("b", temperature="hot"), "temperature: Input should be a valid number"),
        (completion("b", logprobs=3), "logprobs: this field is not served yet"),
        (completion("b", typo=3), "typo: Extra inputs are not permitted"),
        (completion("b", [1, VOCAB_SIZE]), f"token id {VOCAB_SIZE} is not in 0..{VOCAB_SIZE - 1}"),
        (completion("b", stream=True), "stream must be false or absent in a batch"),
        (completion("b", speculation={"draft_length": 17}), "draft_length"),
    ],
)
def test_a_mistake_of_one_request_is_foretold_and_refuses_nothing(
    tmp_path: Path, record: object, message: str
) -> None:
    report = check_lines(tmp_path, GOOD, record, completion("c"))
    assert (report.num_rows, report.num_failing) == (3, 1)
    assert "in.jsonl:2: " in report.failing[0] and message in report.failing[0]


def test_short_prompts_are_not_tokenized(tmp_path: Path) -> None:
    bodies = body_check()
    long = completion("long", "x" * 119)  # fits exactly as tokens, and not by the bound
    rows = write_jsonl(tmp_path / "in.jsonl", [chat("a"), GOOD | {"custom_id": "b"}, long])
    report = check(JsonLines(str(rows)), bodies)
    assert report.num_failing == 0 and bodies.num_tokenized == 1


def test_the_model_may_be_left_out_or_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [GOOD, completion("b", model=MODEL)])
    rows = good_rows(JsonLines(str(path)))
    assert [row.body["model"] for row in rows] == [MODEL, MODEL]
    (error, named) = JsonLines(str(path)).rows(("other", MODEL))
    assert "body.model is missing, and must be one of other, tiny" in str(error)
    assert not isinstance(named, InputError)


def test_a_key_stands_for_all_that_an_answer_depends_on(tmp_path: Path) -> None:
    variants = [
        completion("a"),
        completion("b"),
        completion("a", temperature=0.5),
        completion("a", "other"),
        chat("a"),
    ]
    path = write_jsonl(tmp_path / "in.jsonl", variants)
    rows = good_rows(JsonLines(str(path)))
    keys = {row.key(DEFAULTS) for row in rows} | {rows[0].key(RowDefaults((MODEL,), seed=1))}
    assert len(keys) == len(variants) + 1
    turned = dict(reversed(list(rows[0].body.items())))
    write_jsonl(path, [{**completion("a"), "body": turned}])
    assert good_rows(JsonLines(str(path)))[0].key(DEFAULTS) == rows[0].key(DEFAULTS)


def test_compressed_and_remote_inputs_are_read(tmp_path: Path) -> None:
    raw = json.dumps(GOOD).encode() + b"\n"
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + raw))
    with fsspec.open("memory://batch/in.jsonl", "wb") as file:
        file.write(raw)
    smaller = tmp_path / "in.jsonl.zst"
    smaller.write_bytes(zstandard.compress(raw))
    for path in (str(smaller), str(packed), "memory://batch/in.jsonl", f"file://{packed}"):
        assert check(open_source(path, None)).num_rows == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/in.jsonl", "cannot read /no/such/in.jsonl: no such file or folder"),
        ("nosuch://bucket/in.jsonl", "cannot open nosuch://bucket/in.jsonl: Protocol not known"),
    ],
)
def test_an_input_that_is_not_there_is_one_line(path: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        open_source(path, None)


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
def test_what_is_not_packed_as_it_is_named_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not packed\n")
    with pytest.raises(SettingsError, match=f"cannot read .*{name}: "):
        check(open_source(str(path), None))


TEMPLATE = Template("Summarise {text}", {"max_tokens": 5})


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("a {brace}")
    (tmp_path / "in" / "sub" / "a.txt").write_text("é", encoding="utf-8-sig")
    (tmp_path / "in" / ".hidden").write_text("no")
    rows = good_rows(open_source(str(tmp_path / "in"), TEMPLATE))
    assert [row.custom_id for row in rows] == ["b.txt", "sub/a.txt"]
    assert [row.body["messages"][0]["content"] for row in rows] == [
        "Summarise a {brace}",
        "Summarise é",
    ]
    assert all(row.body["max_tokens"] == 5 for row in rows)
    (tmp_path / "in" / "c.bin").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"in/c\.bin: not UTF-8: byte 0xff at offset 2"):
        check(open_source(str(tmp_path / "in"), TEMPLATE))


def test_a_folder_needs_a_template_with_its_text(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="say with --template what to ask of each"):
        open_source(str(tmp_path), None)
    for text, wrong in (("no field", "no {text}"), ("{text} {date}", "{date}")):
        with pytest.raises(SettingsError, match=wrong):
            open_source(str(tmp_path), Template(text))


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_rows_with_bodies(tmp_path: Path) -> None:
    texts = [json.dumps(completion("x")["body"]) for _ in range(3)]
    path = write_parquet(
        tmp_path / "in.parquet", custom_id=[1, 2, 3], body=texts, url=["/v1/completions"] * 3
    )
    rows = good_rows(open_source(str(path), None))
    assert [row.custom_id for row in rows] == ["1", "2", "3"]
    assert rows[0].body["prompt"] == "once upon a time"
    structs = [
        {"prompt": "a", "max_tokens": 3, "seed": None},
        {"prompt": "b", "max_tokens": 3, "seed": 9},
    ]
    path = write_parquet(tmp_path / "s.parquet", body=structs, url=["/v1/completions"] * 2)
    rows = good_rows(open_source(str(path), None))
    assert [row.custom_id for row in rows] == ["row-1", "row-2"]
    assert "seed" not in rows[0].body and rows[1].body["seed"] == 9


def test_parquet_rows_by_a_template(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in.parquet", text=["one", "two"], lang=["en", "fr"])
    template = Template("In {lang}: {text}")
    contents = [
        r.body["messages"][0]["content"] for r in good_rows(ParquetRows(str(path), template))
    ]
    assert contents == ["In en: one", "In fr: two"]
    with pytest.raises(InputError, match="there is no column 'date', but text, lang"):
        check(ParquetRows(str(path), Template("{date}")))
    with pytest.raises(InputError, match="no column 'body', but text, lang; or give a --template"):
        check(open_source(str(path), None))


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"in\.parquet is not Parquet"):
        check(open_source(str(path), None))


def test_ids_take_eight_bytes_a_row(tmp_path: Path) -> None:
    """What the check keeps of each row: a set of the ids would take ten times as much."""
    path = write_jsonl(tmp_path / "in.jsonl", [completion(f"row-{i}") for i in range(1000)])
    checked = InputCheck(JsonLines(str(path)), DEFAULTS, Answered().freeze(), None)
    checked.run(lambda: None)
    assert sys.getsizeof(checked._ids) < 10 * 1000
