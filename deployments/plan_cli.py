"""`magicdec plan`: what a model will reach on a device, predicted from its config alone."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from magicdec.config import DRAFTERS, MAX_DRAFT_LENGTH, ConfigError
from magicdec.deployments.command_errors import one_line_errors
from magicdec.planning.plan import Plan, PlanRequest, draft_settings

_CONTEXTS = (2048, 8192, 32768, 131072)

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder, config.json, hub id in the local cache, or the embedded model.",
        show_default=False,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="A known GPU (h100, a100-80g, l40s, ...; a wrong name lists them), or `this`: "
        "measured here. Default: this.",
        show_default=False,
    ),
]
Bandwidth = Annotated[
    float | None, typer.Option(help="Measured memory bandwidth, GB/s.", show_default=False)
]
Flops = Annotated[
    float | None, typer.Option(help="Measured arithmetic rate, TFLOP/s.", show_default=False)
]
Memory = Annotated[
    float | None, typer.Option(help="Memory for weights and KV, GB.", show_default=False)
]
OverheadMs = Annotated[
    float | None,
    typer.Option(help="Measured overhead of a forward, ms, all-reduces in it.", show_default=False),
]
TensorParallel = Annotated[
    int, typer.Option("--tp", "--tensor-parallel-size", help="Devices that share the model.")
]
Contexts = Annotated[
    str | None,
    typer.Option("--context", help="Context lengths: 8192,32k.", show_default=False),
]
Batches = Annotated[str, typer.Option("--batch", help="Sequences decoded at once.")]
Acceptance = Annotated[
    str | None,
    typer.Option(
        help="Of a drafted token; one number, or one a budget. Default: by the paper's figures.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32, of weights and KV.")]
MaxDraftLength = Annotated[
    int, typer.Option(help=f"Tokens drafted a round at most; {MAX_DRAFT_LENGTH} is the limit.")
]
Budgets = Annotated[str, typer.Option("--budget", help="KV positions that a draft may read.")]
Drafters = Annotated[
    str, typer.Option("--drafter", help=f"Who may draft: {', '.join(DRAFTERS)}; a list.")
]
DraftModel = Annotated[
    str | None, typer.Option(help="The model behind drafter draft_model.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw it into a .png, .svg or .pdf file.", show_default=False),
]


def plan(
    model: Model,
    gpu: Gpu = None,
    bandwidth: Bandwidth = None,
    flops: Flops = None,
    memory: Memory = None,
    overhead_ms: OverheadMs = None,
    tensor_parallel_size: TensorParallel = 1,
    context: Contexts = None,
    batch: Batches = "1,8,32,128",
    acceptance: Acceptance = None,
    dtype: Dtype = "bfloat16",
    max_draft_length: MaxDraftLength = MAX_DRAFT_LENGTH,
    budget: Budgets = "256,512,1024,2048,4096",
    drafter: Drafters = "recycled",
    draft_model: DraftModel = None,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Predict rates, the best draft and the bottleneck of a model on a GPU, before running it.

    A config file is enough. docs/planning.md says how to read it and what is assumed.
    """
    figures = {"bandwidth": bandwidth, "flops": flops, "memory": memory, "overhead_ms": overhead_ms}
    lists = {"context": context, "batch": batch, "acceptance": acceptance}
    lists |= {"budget": budget, "drafter": drafter}
    with one_line_errors():
        if plot is not None:
            _check_plot(plot)
        from magicdec.deployments.plan_inputs import split_notes  # torch, transformers: seconds

        limits = (tensor_parallel_size, max_draft_length)
        found = Plan(_request((model, draft_model), gpu, dtype, figures, lists, limits))
        notes = split_notes(model, found.request.model, tensor_parallel_size)
        _show(found, notes, dtype, as_json=as_json, plot=plot)


def _request(
    models: tuple[str, str | None],  # the draft model second
    gpu: str | None,
    dtype: str,
    figures: dict[str, float | None],
    lists: dict[str, str | None],
    limits: tuple[int, int],  # tensor_parallel_size, max_draft_length
) -> PlanRequest:
    """Raises ConfigError, and ModelNotFoundError."""
    from magicdec.deployments import plan_inputs as read

    here = read.is_this_machine(gpu, figures)
    model, draft_model = models
    shape = read.read_model(model, dtype, on_this_machine=here)
    draft = None
    if draft_model is not None:
        draft = read.read_model(draft_model, dtype, on_this_machine=here)
    accepted, drafters = lists["acceptance"], lists["drafter"] or ""
    settings = draft_settings(
        [name.strip() for name in drafters.split(",")],
        read.whole_numbers("budget", lists["budget"] or ""),
        () if accepted is None else read.numbers("acceptance", accepted),
    )
    return PlanRequest(
        model=shape,
        device=read.read_device(gpu, dtype, figures, shape.geometry.num_layers),
        batch_sizes=read.whole_numbers("batch", lists["batch"] or ""),
        context_lens=_contexts(lists["context"], shape.max_context),
        settings=settings,
        num_ranks=limits[0],
        max_draft_length=limits[1],
        draft_model=draft,
    )


def _show(
    found: Plan, notes: tuple[str, ...], dtype: str, *, as_json: bool, plot: Path | None
) -> None:
    from magicdec.deployments.plan_table import plan_document, print_plan

    if as_json:
        typer.echo(json.dumps(plan_document(found, notes), indent=2))
    else:
        print_plan(found, notes, dtype, Console())
    if plot is not None:
        from magicdec.deployments.plan_plot import draw_plan

        try:
            draw_plan(found, plot)
        except OSError as error:
            raise ConfigError(f"plot: cannot write {plot}: {error.strerror}") from error


def _contexts(given: str | None, max_context: int | None) -> tuple[int, ...]:
    from magicdec.deployments.plan_inputs import whole_numbers

    if given is not None:
        return whole_numbers("context", given)
    within = tuple(c for c in _CONTEXTS if max_context is None or c <= max_context)
    return within or (max_context or _CONTEXTS[0],)


def _check_plot(path: Path) -> None:
    """Before anything is computed. Raises ConfigError."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot must end in .png, .svg or .pdf, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: there is no folder {str(path.parent)!r}")
    if find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib: pip install 'magicdec[plot]'")
