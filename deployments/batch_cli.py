"""`magicdec batch run`: its flags, and how it ends."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from magicdec.deployments import cli_options as flag
from magicdec.deployments.command_errors import INTERRUPTED, one_line_errors
from magicdec.deployments.settings import ServeSettings, SettingsError, load_settings

Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT", help="JSONL in OpenAI's batch format, *.parquet, or a folder of texts."
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="JSONL; one that is there is gone on with.")
]
TemplateText = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="The prompt for each text of a folder ({text}, {name}) or row of Parquet ({column}).",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="With --template: longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="With --template: 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Of rows whose bodies have none.")]
RetryErrors = Annotated[
    bool, typer.Option("--retry-errors", help="Ask again what the output has an error for.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on with an output that other settings made.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Start nothing where a row is known to fail.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check input and output, start nothing.")]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster to run on: HOST:6379, or auto.", show_default=False),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint", help="A running server to ask instead.", show_default=False),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with the key of --endpoint.", show_default=False)
]
MaxLiveRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows asked for at a time. Default: twice what the engines run.",
        show_default=False,
    ),
]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds that a row waits for engines that are gone.")
]

batch = typer.Typer(
    no_args_is_help=True, help="Offline jobs: a file of requests in, a file of answers out."
)


@batch.callback()
def _batch() -> None:
    """So that `run` is a command of its own."""


@batch.command()
def run(
    input_path: Input,
    output_path: Output,
    template: TemplateText = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    retry_errors: RetryErrors = False,
    force: Force = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    address: Address = None,
    endpoint: EndpointUrl = None,
    api_key_file: ApiKeyFile = None,
    max_live_rows: MaxLiveRows = None,
    patience: Patience = 1800.0,
    config: flag.Config = None,
    model: flag.Model = None,
    served_name: flag.ServedName = None,
    dtype: flag.Dtype = None,
    max_model_len: flag.MaxModelLen = None,
    kv_cache_gib: flag.KvCacheGib = None,
    drafter: flag.Drafter = None,
    draft_length: flag.DraftLength = None,
    draft_budget: flag.DraftBudget = None,
    draft_model: flag.DraftModel = None,
    verification: flag.Verification = None,
    tensor_parallel_size: flag.TensorParallel = None,
    num_threads: flag.NumThreads = None,
    num_replicas: flag.NumReplicas = None,
    verbose: flag.Verbose = False,
) -> None:
    """Answer every request of a file. The same command again goes on where it was stopped.

    Exit codes: 0 every row is answered, 2 nothing was started (input, output or settings are
    wrong), 3 every row has its line but some are errors, 4 stopped before the end, 130 Ctrl-C.
    docs/batch.md has the formats.
    """
    draft = {"drafter": drafter, "draft_length": draft_length, "draft_budget": draft_budget}
    model_flags = {"path": model, "served_name": served_name, "dtype": dtype}
    flags: dict[str, dict[str, Any]] = {
        "model": {**model_flags, "max_model_len": max_model_len},
        "cache": {"kv_cache_gib": kv_cache_gib},
        "speculation": {**draft, "draft_model": draft_model, "verification": verification},
        "parallel": {"tensor_parallel_size": tensor_parallel_size, "num_threads": num_threads},
        "server": {"num_replicas": num_replicas},
    }
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    rules = {"retry_errors": retry_errors, "force": force, "strict": strict}
    where = {"address": address, "endpoint": endpoint, "dry_run": dry_run, "verbose": verbose}
    limits = {"seed": seed, "max_live_rows": max_live_rows, "patience_s": patience}
    with one_line_errors():
        _check_places(flags, config, address=address, endpoint=endpoint, api_key_file=api_key_file)
        key = None if api_key_file is None else _read_key(api_key_file)
        options = {"input": input_path, "output": output_path, "api_key": key, **where, **limits}
        settings = _settings(config, flags)
        raise typer.Exit(_run(options, (template, sampling), rules, settings))


def _run(
    options: dict[str, Any],
    template: tuple[str | None, dict[str, Any]],
    rules: dict[str, bool],
    settings: ServeSettings,
) -> int:
    from magicdec.deployments.batch_command import STOPPED, BatchOptions, run_batch
    from magicdec.deployments.batch_job import JobRules
    from magicdec.deployments.batch_output import JobStopped
    from magicdec.deployments.batch_sources import Template

    text, sampling = template
    if text is not None and not Template(text).fields:
        raise SettingsError(f"--template holds no {{field}}: every row would be the same, {text!r}")
    made = None if text is None else Template(text, sampling)
    again = f"Run the same command again to go on: the answers so far are in {options['output']}."
    try:
        return run_batch(
            BatchOptions(**options, template=made, rules=JobRules(**rules)),
            settings,
            Console(stderr=True),
        )
    except JobStopped as error:
        typer.echo(f"magicdec: stopped: {error}\n{again}", err=True)
        return STOPPED
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        return INTERRUPTED


def _check_places(
    flags: dict[str, dict[str, Any]],
    config: Path | None,
    *,
    address: str | None,
    endpoint: str | None,
    api_key_file: Path | None,
) -> None:
    """Raises SettingsError for flags that would not be heard."""
    if endpoint is None:
        if api_key_file is not None:
            raise SettingsError("--api-key-file is for --endpoint")
        return
    if address is not None:
        raise SettingsError("give --address or --endpoint, not both")
    named = {"config": config, **{n: v for fields in flags.values() for n, v in fields.items()}}
    given = [name for name, value in named.items() if value is not None]
    if given:
        name = "model" if given[0] == "path" else given[0].replace("_", "-")
        raise SettingsError(f"--{name} is the server's to choose: it has no effect on --endpoint")


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    if not key or "\n" in key:
        raise SettingsError(f"{path} must hold one key")
    return key


def _settings(config: Path | None, flags: dict[str, dict[str, Any]]) -> ServeSettings:
    """The file with the given flags on top. Raises SettingsError."""
    given = {
        section: {name: value for name, value in fields.items() if value is not None}
        for section, fields in flags.items()
    }
    return load_settings(None if config is None else str(config), given)
