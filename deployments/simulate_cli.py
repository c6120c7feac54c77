"""`magicdec simulate`: a request trace through N simulated replicas, by policy and draft."""

import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from magicdec.config import ConfigError
from magicdec.control.round_costs import RoundCosts
from magicdec.deployments import plan_cli as plan_flag
from magicdec.deployments.command_errors import one_line_errors
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.simulate_table import Run, print_runs, runs_document
from magicdec.routing.settings import AdmissionConfig
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import Drafts
from magicdec.simulation.policies import POLICIES
from magicdec.simulation.simulator import ClusterConfig, Workload
from magicdec.simulation.simulator import simulate as run_simulation
from magicdec.simulation.trace import TraceError

_MAX_QUEUED = AdmissionConfig().max_queued_requests
_LEAST_WIDTH = 100  # columns that the table takes
_FEW_REQUESTS = 2000  # up to which the controller is asked before every round
_ROUNDS_PER_CHOICE = 64  # beyond

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder, config.json, hub id in the local cache, or the embedded model.",
    ),
]
Replicas = Annotated[int, typer.Option(help="Simulated replicas.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        help="Step times of a profile file, as a replica keeps it on disk, instead of a device's.",
        show_default=False,
    ),
]
KvTokens = Annotated[
    int | None,
    typer.Option(
        help="KV tokens of a replica. Default: what the device holds; with --profile, 2 GiB.",
        show_default=False,
    ),
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(help="Sequences that a replica runs at once.", show_default=False)
]
MaxBatchTokens = Annotated[
    int | None, typer.Option(help="Rows of one forward.", show_default=False)
]
InterToken = Annotated[
    float,
    typer.Option("--inter-token-target", help="Prefill beside decode rows stays within it, s."),
]
Trace = Annotated[
    Path | None,
    typer.Option(help="JSONL of arrivals and lengths: docs/simulation.md.", show_default=False),
]
Rate = Annotated[float | None, typer.Option(help="Poisson arrivals a second.", show_default=False)]
Requests = Annotated[int, typer.Option(help="Of the Poisson stream, as all that follows.")]
PromptTokens = Annotated[str, typer.Option(help="LOW:HIGH, log-uniform.")]
OutputTokens = Annotated[str, typer.Option(help="LOW:HIGH, log-uniform; HIGH is the limit.")]
PrefixShare = Annotated[float, typer.Option(help="Requests that begin alike, of all.")]
PrefixTokens = Annotated[int, typer.Option(help="Of such a beginning.")]
NumPrefixes = Annotated[int, typer.Option(help="Different beginnings.")]
NumKeys = Annotated[int, typer.Option(help="API keys, as often used.")]
Seed = Annotated[int, typer.Option(help="Of arrivals, lengths and acceptance.")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help=f"{', '.join(POLICIES)}. Default: all.", show_default=False),
]
DraftNames = Annotated[
    list[str] | None,
    typer.Option("--draft", help="adaptive, or a draft length; default: adaptive."),
]
Drafter = Annotated[str, typer.Option(help="Who drafts.")]
DraftBudget = Annotated[int, typer.Option(help="KV positions that a draft step reads.")]
Acceptance = Annotated[
    float, typer.Option(help="Median over the requests, of a drafted token; a trace may say.")
]
Spread = Annotated[float, typer.Option("--acceptance-spread", help="Of the requests, in log-odds.")]
RoundsPerChoice = Annotated[
    int | None,
    typer.Option(
        help=f"Rounds between choices. Default: 1, and {_ROUNDS_PER_CHOICE} above "
        f"{_FEW_REQUESTS:,} requests.",
        show_default=False,
    ),
]
MaxQueued = Annotated[
    int, typer.Option("--max-queued-requests", help="At the router; more are refused.")
]


def simulate(
    model: Model = EMBEDDED_MODEL_NAME,
    replicas: Replicas = 2,
    gpu: plan_flag.Gpu = None,
    bandwidth: plan_flag.Bandwidth = None,
    flops: plan_flag.Flops = None,
    memory: plan_flag.Memory = None,
    overhead_ms: plan_flag.OverheadMs = None,
    tensor_parallel_size: plan_flag.TensorParallel = 1,
    dtype: plan_flag.Dtype = "bfloat16",
    profile: Profile = None,
    kv_tokens: KvTokens = None,
    max_num_seqs: MaxNumSeqs = None,
    max_batch_tokens: MaxBatchTokens = None,
    inter_token_target_s: InterToken = 1.0,
    trace: Trace = None,
    rate: Rate = None,
    requests: Requests = 1000,
    prompt_tokens: PromptTokens = "100:4000",
    output_tokens: OutputTokens = "32",
    prefix_share: PrefixShare = 0.0,
    prefix_tokens: PrefixTokens = 1000,
    num_prefixes: NumPrefixes = 1,
    num_keys: NumKeys = 1,
    seed: Seed = 0,
    policy: Policies = None,
    draft: DraftNames = None,
    drafter: Drafter = "recycled",
    draft_budget: DraftBudget = 512,
    acceptance: Acceptance = 0.8,
    acceptance_spread: Spread = 0.5,
    rounds_per_choice: RoundsPerChoice = None,
    max_queued_requests: MaxQueued = _MAX_QUEUED,
    as_json: plan_flag.Json = False,
) -> None:
    """Compare routing policies and draft lengths on simulated replicas, by the router's own code.

    A config file and the device's figures, or a profile, are enough. docs/simulation.md says what
    is simulated and what is not.
    """
    with one_line_errors():
        from magicdec.deployments import simulate_inputs as read  # torch and transformers: seconds

        policies = _policies(policy)
        figures = {"bandwidth": bandwidth, "flops": flops, "memory": memory}
        fields = {
            "num_requests": requests,
            "prompt_tokens": read.bounds("prompt_tokens", prompt_tokens),
            "output_tokens": read.bounds("output_tokens", output_tokens),
            "prefix_share": prefix_share,
            "num_prefixes": num_prefixes,
            "num_prefix_tokens": prefix_tokens,
            "num_keys": num_keys,
        }
        law = AcceptanceLaw(acceptance, acceptance_spread, seed)
        workload = Workload(read.read_traffic(trace, rate, {**fields, "seed": seed}), law)
        each = _rounds_per_choice(workload) if rounds_per_choice is None else rounds_per_choice
        names = dict.fromkeys(draft or ["adaptive"])
        drafts = [Drafts.parse(name, drafter, draft_budget, each) for name in names]
        flags = read.MachineFlags(
            model=model,
            dtype=dtype,
            drafter=drafter,
            gpu=gpu,
            figures={**figures, "overhead_ms": overhead_ms},
            num_ranks=tensor_parallel_size,
            profile=profile,
            kv_tokens=kv_tokens,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            inter_token_target_s=inter_token_target_s,
        )
        machine = read.read_machine(flags)
        admission = AdmissionConfig(max_queued_requests=max_queued_requests)
        config = ClusterConfig(replicas, machine.engine, admission)
        runs = _run_all(workload, policies, drafts, config, machine.costs)
        if as_json:
            typer.echo(json.dumps(runs_document(runs), indent=2, allow_nan=False))
        else:
            print_runs(runs, _heading(workload, config, machine.origin), _console())


def _console() -> Console:
    """A narrow terminal wraps the lines; columns that are cut say nothing."""
    return Console(width=max(Console().width, _LEAST_WIDTH))


def _rounds_per_choice(workload: Workload) -> int:
    return _ROUNDS_PER_CHOICE if len(workload.requests) > _FEW_REQUESTS else 1


def _policies(names: Sequence[str] | None) -> list[str]:
    """Raises ConfigError for one that is not known."""
    found = list(dict.fromkeys(names or POLICIES))
    if unknown := [name for name in found if name not in POLICIES]:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {unknown[0]!r}")
    return found


def _run_all(
    workload: Workload,
    policies: Sequence[str],
    drafts: Sequence[Drafts],
    config: ClusterConfig,
    costs: RoundCosts,
) -> list[Run]:
    """Every policy with every draft, with a progress bar where a person looks on. Raises
    ConfigError."""
    console = Console(stderr=True)
    runs: list[Run] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for policy, drafting in product(policies, drafts):
            task = progress.add_task(f"{policy} {drafting.name}", total=len(workload.requests))
            told = partial(_tell, progress, task)
            started = time.process_time()
            try:
                result = run_simulation(workload, policy, drafting, config, costs, told)
            except TraceError as error:
                raise ConfigError(str(error)) from error
            runs.append(Run(result, time.process_time() - started))
            progress.remove_task(task)
    return runs


def _tell(progress: Progress, task: TaskID, num_ended: int) -> None:
    progress.update(task, completed=num_ended)


def _heading(workload: Workload, config: ClusterConfig, origin: str) -> str:
    engine = config.engine
    return (
        f"{len(workload.requests):,} requests, {config.num_replicas:,} replicas of "
        f"{engine.total_kv_tokens:,} KV tokens, {engine.max_num_seqs} sequences and "
        f"{engine.max_batch_tokens:,} rows a step\n{origin}\n"
    )
