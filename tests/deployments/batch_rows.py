"""Batch inputs and outputs of tests, and a job whose answers cost nothing."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from magicdec.deployments.batch_answered import AnsweredIndex
from magicdec.deployments.batch_job import Answerer, BatchJob, JobRules, opened
from magicdec.deployments.batch_manifest import Manifest
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_output import RowResult
from magicdec.deployments.batch_progress import Figures, ProgressView
from magicdec.deployments.batch_row import BatchRow, InputError, RowDefaults
from magicdec.deployments.batch_sources import JsonLines, Source

MODEL = "tiny"
DEFAULTS = RowDefaults((MODEL,), seed=0)
MANIFEST = Manifest({"model": MODEL, "dtype": "float32"}, {})
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def completion(custom_id: str, prompt: Any = "once upon a time", **body: Any) -> dict[str, Any]:
    fields = {"prompt": prompt, "max_tokens": 8, **body}
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": fields}


def chat(custom_id: str, content: Any = "hello", **body: Any) -> dict[str, Any]:
    fields = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": fields}


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def good_rows(source: Source) -> list[BatchRow]:
    rows = list(source.rows(DEFAULTS.models))
    assert not [row for row in rows if isinstance(row, InputError)]
    return [row for row in rows if isinstance(row, BatchRow)]


def answer(row: BatchRow, *, is_error: bool = False) -> RowResult:
    key = row.key(DEFAULTS)
    if is_error:
        return RowResult(row.custom_id, key, None, {"code": "broken", "message": "no"})
    response = {"status_code": 200, "request_id": "r", "body": {"text": row.custom_id}}
    return RowResult(row.custom_id, key, response, None, 3, 5, 2, 3)


def left(source: Source, answered: AnsweredIndex) -> Iterator[BatchRow]:
    for row in good_rows(source):
        if not answered.has(row.custom_id, row.key(DEFAULTS)):
            yield row


def answers_all(source: Source, failing: tuple[str, ...] = ()) -> Answerer:
    """Each row at once; those of `failing` with an error."""

    def answerer(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
        for row in left(source, answered):
            yield Outcome(answer(row, is_error=row.custom_id in failing))

    return answerer


def run_job(
    input_path: Path,
    output: Path,
    answerer: Answerer | None = None,
    manifest: Manifest = MANIFEST,
    **rules: bool,
) -> BatchJob:
    """Check, prepare and run. Without an answerer every row is answered."""
    source = JsonLines(str(input_path))
    with opened(source, output, DEFAULTS, manifest, JobRules(**rules)) as job:
        job.check(None, lambda: None)
        figures: Figures = job.prepare()
        with ProgressView(Console(quiet=True), figures) as view:
            job.run(answerer or answers_all(source), view, figures)
        return job
