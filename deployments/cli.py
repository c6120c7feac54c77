"""The command line: `magicdec serve | generate | batch | plan | bench | simulate` and so on."""

import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from magicdec.deployments import cli_options as flag
from magicdec.deployments.batch_cli import batch
from magicdec.deployments.bench_cli import bench
from magicdec.deployments.command_errors import one_line_errors
from magicdec.deployments.dashboards_cli import dashboards
from magicdec.deployments.embedded_model import list_models, resolve_models
from magicdec.deployments.plan_cli import plan
from magicdec.deployments.settings import ServeSettings, SettingsError, load_settings
from magicdec.deployments.simulate_cli import simulate

Flags = dict[str, dict[str, Any]]  # section -> field -> value, None where not given

app = typer.Typer(
    name="magicdec",
    help="Serve long-context language models, decoded by sparse-KV self-speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(batch, name="batch")
app.command()(plan)
app.command()(bench)
app.command()(simulate)
app.add_typer(dashboards)


@app.command()
def serve(
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
    host: flag.Host = None,
    port: flag.Port = None,
    api_keys_file: flag.ApiKeysFile = None,
    verbose: flag.Verbose = False,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint on this machine.

    Without a model the embedded SmolLM2-135M-Instruct is served. Ctrl-C stops it.
    """
    model_flags = {"path": model, "served_name": served_name}
    draft = {"drafter": drafter, "draft_length": draft_length, "draft_budget": draft_budget}
    parallel = {"tensor_parallel_size": tensor_parallel_size, "num_threads": num_threads}
    server = {"num_replicas": num_replicas, "host": host, "port": port}
    flags: Flags = {
        "model": {**model_flags, "dtype": dtype, "max_model_len": max_model_len},
        "cache": {"kv_cache_gib": kv_cache_gib},
        "speculation": {**draft, "draft_model": draft_model, "verification": verification},
        "parallel": parallel,
        "server": {**server, "api_keys_file": api_keys_file},
    }
    with one_line_errors():
        from magicdec.deployments.serve_command import serve as run

        run(_settings(config, flags), Console(), verbose=verbose)


@app.command()
def generate(
    prompt: flag.Prompt = None,
    prompt_file: flag.PromptFile = None,
    chat: flag.Chat = True,
    max_tokens: flag.MaxTokens = 256,
    temperature: flag.Temperature = 0.0,
    seed: flag.Seed = None,
    config: flag.Config = None,
    model: flag.Model = None,
    dtype: flag.Dtype = None,
    max_model_len: flag.MaxModelLen = None,
    kv_cache_gib: flag.KvCacheGib = None,
    drafter: flag.Drafter = None,
    draft_length: flag.DraftLength = None,
    draft_budget: flag.DraftBudget = None,
    draft_model: flag.DraftModel = None,
    verification: flag.Verification = None,
    num_threads: flag.NumThreads = None,
) -> None:
    """Answer one prompt in this process, without a server.

    The text goes to stdout as it comes, counts and speed to stderr.
    """
    draft = {"drafter": drafter, "draft_length": draft_length, "draft_budget": draft_budget}
    flags: Flags = {
        "model": {"path": model, "dtype": dtype, "max_model_len": max_model_len},
        "cache": {"kv_cache_gib": kv_cache_gib},
        "speculation": {**draft, "draft_model": draft_model, "verification": verification},
        "parallel": {"num_threads": num_threads},
    }
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with one_line_errors():
        settings = _settings(config, flags)
        text = _prompt_text(prompt, prompt_file)
        resolve_models(settings.model_paths)
        _generate(settings, text, sampling, chat=chat)


@app.command()
def models() -> None:
    """List the models that can be named without a folder or a hub id."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)  # to be copied from here
    for column in ("state", "folder", "description"):
        table.add_column(column, overflow="fold")
    for entry in list_models():
        state = "ready" if entry.converted else "converted at first use"
        table.add_row(entry.name, state, str(entry.folder), entry.description)
    Console().print(table)


def main() -> None:
    """The console script."""
    app()


def _generate(
    settings: ServeSettings, prompt: str, sampling: dict[str, Any], *, chat: bool
) -> None:
    from magicdec.deployments.generate_command import Generation

    generation = Generation(settings, prompt, sampling, chat=chat)
    for output in generation.outputs():
        sys.stdout.write(output.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stderr.write(generation.summary() + "\n")


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise SettingsError("give a prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is None:
        return sys.stdin.read()
    try:
        return prompt_file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {prompt_file}: {error.strerror}") from error


def _settings(config: Path | None, flags: Flags) -> ServeSettings:
    """The file with the given flags on top. Raises SettingsError."""
    given = {
        section: {name: value for name, value in fields.items() if value is not None}
        for section, fields in flags.items()
    }
    path = None if config is None else str(config)
    return load_settings(path, {section: fields for section, fields in given.items() if fields})


if __name__ == "__main__":
    main()
