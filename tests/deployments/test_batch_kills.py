"""SIGKILL of the driver, a worker or an engine: each id has one answer, the undisturbed one."""

import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from magicdec.deployments.batch_bodies import MAX_CHOICES, parse_body, requests_of
from magicdec.deployments.batch_row import row_seed
from magicdec.deployments.batch_sources import JsonLines
from magicdec.deployments.command_errors import INTERRUPTED
from magicdec.deployments.engine_builder import build_engine
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.settings import ServeSettings
from tests.deployments.batch_processes import (
    DRIVER,
    ENGINE,
    WORKER,
    start_job,
    write_settings,
)
from tests.deployments.batch_rows import (
    DEFAULTS,
    chat,
    completion,
    good_rows,
    read_lines,
    write_jsonl,
)
from tests.deployments.conftest import tiny_settings

VICTIMS = (ENGINE, WORKER, DRIVER)
MAX_NUM_SEQS = 4


def make_rows(path: Path, num_rows: int) -> Path:
    """Greedy and sampled, with and without a seed, chat and completion, some of one beginning."""
    story = "it was a dark and stormy night; the rain fell in torrents. " * 3
    records = []
    for i in range(num_rows):
        body: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": float(i % 2)}
        if i % 3 == 0:
            body["seed"] = i
        make = chat if i % 4 == 0 else completion
        records.append(make(f"row-{i}", story * (i % 2) + f"chapter {i}", **body))
    return write_jsonl(path, records)


def undisturbed(rows: Path, settings: ServeSettings) -> dict[str, str]:
    """What one engine answers, without Ray: id -> text."""
    built = build_engine(settings.engine_config())
    builder = PromptBuilder(
        built.tokenizer,
        max_model_len=built.engine.max_model_len,
        vocab_size=built.vocab_size,
        max_choices=MAX_CHOICES,
        speculation=settings.engine_config().speculation,
    )
    names, texts = {}, {}
    for row in good_rows(JsonLines(str(rows))):
        body = parse_body(row)
        if body.seed is None:
            seed = row_seed(row.key(DEFAULTS))
            body = body.model_copy(update={"seed": seed})
        (request,) = requests_of(body, builder)
        names[request.request_id] = row.custom_id
        texts[row.custom_id] = ""
        built.engine.add(request)
    while built.engine.has_unfinished():
        for output in built.engine.step():
            texts[names[output.request_id]] += output.text
    return texts


def answers(output: Path) -> dict[str, str]:
    """id -> text; each id must come once, without an error."""
    found: dict[str, str] = {}
    for line in read_lines(output):
        assert line["custom_id"] not in found, "an id was answered twice"
        assert line["error"] is None, line
        (choice,) = line["response"]["body"]["choices"]
        found[line["custom_id"]] = (
            choice["message"]["content"] if "message" in choice else (choice["text"])
        )
    return found


def kill_and_resume(folder: Path, model_dir: Path, num_rows: int, seeds: Iterable[int]) -> None:
    """One job, killed at a moment that each seed chooses; a driver that is gone is started again.

    The moment is a number of answered rows, and up to half a second more.
    """
    settings = tiny_settings(model_dir, max_num_seqs=MAX_NUM_SEQS)
    config = write_settings(folder / "settings.yaml", settings)
    rows, output = make_rows(folder / "in.jsonl", num_rows), folder / "out.jsonl"
    expected = undisturbed(rows, settings)
    job = start_job(rows, output, "--config", str(config))
    seeds = list(seeds)
    for i, seed in enumerate(seeds):
        moment = random.Random(seed)
        share = (i + moment.random()) / (len(seeds) + 1)
        job.wait_for_lines(max(job.num_lines() + 1, int(share * num_rows)))
        delay = moment.uniform(0.0, 0.5)
        job.wait_until(_after(delay), timeout_s=5)
        victim = VICTIMS[seed % len(VICTIMS)]
        job.kill(victim)
        if victim == DRIVER:
            job = start_job(rows, output, "--config", str(config))
    code, said = job.finish()
    assert code == 0, said
    assert answers(output) == expected


def _after(delay_s: float) -> Callable[[], bool]:
    due = time.monotonic() + delay_s
    return lambda: time.monotonic() >= due


@pytest.mark.timeout(400)
def test_three_kills_of_one_job_leave_each_id_with_its_answer(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    kill_and_resume(tmp_path, tiny_model_dir, num_rows=36, seeds=range(3))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would every process that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_ends_in_order_and_is_gone_on_with(
    tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    settings = tiny_settings(tiny_model_dir, max_num_seqs=MAX_NUM_SEQS)
    config = write_settings(tmp_path / "settings.yaml", settings)
    rows, output = make_rows(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"
    job = start_job(rows, output, "--config", str(config))
    job.wait_for_lines(3)
    job.process.send_signal(number)
    code, said = job.finish()
    assert code == INTERRUPTED, said
    assert "Run the same command again to go on" in said and "Traceback" not in said
    assert 3 <= job.num_lines() < 30
    code, said = start_job(rows, output, "--config", str(config)).finish()
    assert code == 0, said
    assert answers(output) == undisturbed(rows, settings)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_one_job_leave_each_id_with_its_answer(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    kill_and_resume(tmp_path, tiny_model_dir, num_rows=240, seeds=range(20))
