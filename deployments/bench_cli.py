"""`magicdec bench`: rates of this machine, measured, and what `magicdec plan` says of them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from magicdec.deployments import cli_options as flag
from magicdec.deployments.command_errors import one_line_errors
from magicdec.deployments.settings import ServeSettings, load_settings

Batches = Annotated[str, typer.Option("--batch", help="Sequences decoded at once.")]
Contexts = Annotated[str, typer.Option("--context", help="Context lengths: 512,2k.")]
Seconds = Annotated[
    float, typer.Option(help="A point, about: of plain decoding, and of speculative.")
]
Rounds = Annotated[
    str, typer.Option(help="LOW:HIGH, of each side in a segment; at least 3 pairs of segments.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="Long plain text to go on from. Default: Python's own library."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy, and may run into loops.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def bench(
    batch: Batches = "1,4,8",
    context: Contexts = "512,2k,4k",
    seconds: Seconds = 3.0,
    rounds: Rounds = "4:24",
    text: Text = None,
    temperature: Temperature = 0.8,
    as_json: Json = False,
    config: flag.Config = None,
    model: flag.Model = None,
    dtype: flag.Dtype = None,
    max_model_len: flag.MaxModelLen = None,
    kv_cache_gib: flag.KvCacheGib = None,
    drafter: flag.Drafter = None,
    draft_budget: flag.DraftBudget = None,
    draft_model: flag.DraftModel = None,
    num_threads: flag.NumThreads = None,
) -> None:
    """Measure plain and speculative decoding on this machine, beside the plan's prediction.

    The engine is the one that `serve` would run, without a server. docs/planning.md says how to
    read the table. Nothing else should be running.
    """
    draft = {"drafter": drafter, "draft_budget": draft_budget, "draft_model": draft_model}
    flags: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype, "max_model_len": max_model_len},
        "cache": {"kv_cache_gib": kv_cache_gib},
        "speculation": draft,
        "parallel": {"num_threads": num_threads},
    }
    with one_line_errors():
        lists = {"batch": batch, "context": context, "rounds": rounds}
        _bench(_settings(config, flags), lists, (seconds, temperature), text, as_json=as_json)


def _bench(
    settings: ServeSettings,
    lists: dict[str, str],
    numbers: tuple[float, float],  # seconds, temperature
    text: Path | None,
    *,
    as_json: bool,
) -> None:
    from magicdec.deployments.bench_inputs import BenchRequest  # torch: seconds
    from magicdec.deployments.bench_points import run_bench
    from magicdec.deployments.bench_table import print_report, report_document
    from magicdec.deployments.plan_inputs import whole_numbers
    from magicdec.deployments.simulate_inputs import bounds

    request = BenchRequest(
        batch_sizes=tuple(dict.fromkeys(whole_numbers("batch", lists["batch"]))),
        context_lens=tuple(dict.fromkeys(whole_numbers("context", lists["context"]))),
        seconds=numbers[0],
        segment_rounds=bounds("rounds", lists["rounds"]),
        temperature=numbers[1],
    )
    report = run_bench(settings.engine_config(), request, text, Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(report_document(report), indent=2))
    else:
        print_report(report, Console())


def _settings(config: Path | None, flags: dict[str, dict[str, Any]]) -> ServeSettings:
    """The file with the given flags on top. Raises SettingsError."""
    given = {
        section: {name: value for name, value in fields.items() if value is not None}
        for section, fields in flags.items()
    }
    return load_settings(None if config is None else str(config), given)
