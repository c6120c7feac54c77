"""`magicdec batch run`: the composition of a batch job, from its options to its exit code."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from typing import Any

from rich.console import Console

from magicdec.deployments.batch_endpoint import Endpoint, EndpointCaller, served_models
from magicdec.deployments.batch_engines import ray_cluster
from magicdec.deployments.batch_job import Answerer, BatchJob, JobRules, failing_lines, opened
from magicdec.deployments.batch_manifest import Manifest
from magicdec.deployments.batch_model_limits import body_check_of
from magicdec.deployments.batch_progress import ProgressView, summary_table
from magicdec.deployments.batch_row import RowDefaults
from magicdec.deployments.batch_sources import Source, Template, open_source
from magicdec.deployments.batch_upload import OutputPlace
from magicdec.deployments.settings import ServeSettings

ALL_DONE = 0
ROW_ERRORS = 3  # every row has its line, some of them an error
STOPPED = 4  # the engines or the endpoint are gone; the same command goes on

ENDPOINT_LIVE_ROWS = 32
LINE_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What the command line says. `max_live_rows` None: as many as keep the engines full."""

    input: str
    output: str
    template: Template | None = None
    seed: int = 0
    rules: JobRules = field(default_factory=JobRules)
    dry_run: bool = False
    address: str | None = None
    endpoint: str | None = None
    api_key: str | None = None
    max_live_rows: int | None = None
    patience_s: float = 1800.0
    verbose: bool = False


def run_batch(options: BatchOptions, settings: ServeSettings, console: Console) -> int:
    """The exit code. Raises SettingsError (and InputError, OutputError), ModelNotFoundError,
    StartFailed, JobStopped."""
    source = open_source(options.input, options.template)
    place = OutputPlace.of(options.output)
    endpoint = None
    if options.endpoint is not None:
        endpoint = Endpoint.of(options.endpoint, options.api_key, options.patience_s)
    defaults = RowDefaults(_served_names(endpoint, settings), options.seed)
    manifest = _manifest(options, settings, defaults)
    with place.staged(), opened(source, place.path, defaults, manifest, options.rules) as job:
        _check(job, endpoint, settings, console)
        if options.dry_run:
            return ROW_ERRORS if job.report.num_failing else ALL_DONE
        figures = job.prepare()
        try:
            if figures.num_left:
                where = _answerer(options, endpoint, settings, source, defaults, console)
                with where as answer, _terminable(), ProgressView(console, figures) as view:
                    job.run(answer, view, figures)
        finally:
            console.print(summary_table(figures, options.output, job.num_errors))
        return ROW_ERRORS if job.num_errors else ALL_DONE


def _served_names(endpoint: Endpoint | None, settings: ServeSettings) -> tuple[str, ...]:
    return (settings.model.name,) if endpoint is None else served_models(endpoint)


def _manifest(options: BatchOptions, settings: ServeSettings, defaults: RowDefaults) -> Manifest:
    answers: dict[str, Any] = {"models": list(defaults.models), "seed": options.seed}
    if options.template is not None:
        answers |= {"template": options.template.text, **options.template.sampling}
    if options.endpoint is None:
        answers |= {
            "model_path": settings.model.path,
            "dtype": settings.model.dtype,
            "max_model_len": settings.model.max_model_len,
            "verification": settings.speculation.verification,
        }
    run = {
        "input": options.input,
        "endpoint": options.endpoint,
        "magicdec": version("magicdec"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings.model_dump(),
    }
    return Manifest(answers, run)


def _check(
    job: BatchJob, endpoint: Endpoint | None, settings: ServeSettings, console: Console
) -> None:
    started, num_rows = time.monotonic(), 0

    def count() -> None:
        nonlocal num_rows
        num_rows += 1
        if num_rows % LINE_ROWS == 0:
            _say(console, f"checked {num_rows:,} rows")

    body_check = None
    if endpoint is None:
        body_check = body_check_of(settings)
    report = job.check(body_check, count)
    seconds = time.monotonic() - started
    rows = "1 row" if report.num_rows == 1 else f"{report.num_rows:,} rows"
    _say(
        console,
        f"The input has {rows}, checked in {seconds:.1f} s; {report.num_answered:,} answered.",
    )
    if report.num_failing:
        _say(console, "\n  ".join(failing_lines(report)))


def _say(console: Console, text: str) -> None:
    """A line is a line, whatever the terminal's width and whatever brackets are in it."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _answerer(
    options: BatchOptions,
    endpoint: Endpoint | None,
    settings: ServeSettings,
    source: Source,
    defaults: RowDefaults,
    console: Console,
) -> Iterator[Answerer]:
    """Ray, and on it the engines or a way to the endpoint, until the end of the block."""
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(options.address, show_worker_logs=options.verbose))
        from magicdec.deployments.batch_dataset import Stage, outcomes

        if endpoint is not None:
            many = Stage(EndpointCaller, endpoint, 1, options.max_live_rows or ENDPOINT_LIVE_ROWS)
            one = replace(many, num_live_rows=1)
        else:
            _say(console, f"Starting {settings.model.name} ...")
            from magicdec.deployments.batch_stages import engine_stages

            many, one = stack.enter_context(
                engine_stages(
                    settings,
                    _app_name(OutputPlace.of(options.output).path),
                    max_live_rows=options.max_live_rows,
                    patience_s=options.patience_s,
                )
            )
        yield lambda answered, alone: outcomes(source, defaults, answered, one if alone else many)


def _app_name(output: Path) -> str:
    """The same for the same file, which one job holds at a time: what a killed job left on a
    cluster is replaced by the next, and no other's is."""
    place = f"{gethostname()}:{output.absolute()}"
    return "magicdec-batch-" + blake2b(place.encode(), digest_size=4).hexdigest()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the job as Ctrl-C does, in order. To be entered when Ray has been started, which
    sets a handler of its own."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
