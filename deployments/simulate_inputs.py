"""What a simulation is asked, from the words of a command line: costs, a cluster, traffic."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicdec.config import CacheConfig, ConfigError, SchedulerConfig, SpeculativeConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.cost_model import VERIFY, CostModel, StepCost, draft_kind
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.plan_inputs import THIS, read_device, read_model
from magicdec.planning.memory import MemoryPlan
from magicdec.profiling.profile_cache import read_profile
from magicdec.profiling.step_profile import PREFILL, StepProfile, begin_kind, observe_kind
from magicdec.roofline import roofline_cost
from magicdec.simulation.steps import EngineShape
from magicdec.simulation.trace import PoissonTraffic, TraceError, TraceRequest, read_trace

_BOUNDS = re.compile(r"(\d+)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Machine:
    """What one replica's steps take, and its limits."""

    costs: ProfiledRoundCosts
    engine: EngineShape
    origin: str  # of the costs, for people


@dataclass(frozen=True, slots=True)
class MachineFlags:
    """As given; None: not given. `figures` as plan_inputs.read_device has them."""

    model: str
    dtype: str
    drafter: str
    gpu: str | None
    figures: dict[str, float | None]
    num_ranks: int
    profile: Path | None
    kv_tokens: int | None
    max_num_seqs: int | None
    max_batch_tokens: int | None
    inter_token_target_s: float


def read_machine(flags: MachineFlags) -> Machine:
    """By a profile, or by the roofline of a device. Raises ConfigError, ModelNotFoundError."""
    given = [name for name, value in flags.figures.items() if value is not None]
    if flags.profile is not None and (flags.gpu is not None or given):
        raise ConfigError(f"give profile or {'gpu' if flags.gpu else given[0]}, not both")
    return _rooflined(flags) if flags.profile is None else _profiled(flags, flags.profile)


def _profiled(flags: MachineFlags, path: Path) -> Machine:
    model = Path(resolve_model(flags.model))
    folder = model.parent if model.is_file() else model
    kinds = (VERIFY, PREFILL, draft_kind(flags.drafter))
    try:
        key, profile = read_profile(path, str(folder), kinds)
        settings = json.loads(key.settings)
        if not isinstance(settings, dict):
            raise ValueError(f"its settings are {settings!r}")
    except OSError as error:
        raise ConfigError(f"cannot read profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"profile {path} cannot be used: {error}") from error
    geometry = read_model(flags.model, key.dtype).geometry
    pool = CacheConfig().pool_bytes * key.tensor_parallel_size
    engine = _engine(flags, pool // geometry.kv_bytes_per_token, settings)
    costs = ProfiledRoundCosts(profile, geometry, SpeculativeConfig())
    return Machine(costs, engine, f"profile of {key.device}, {key.num_threads} threads")


def _rooflined(flags: MachineFlags) -> Machine:
    here = flags.gpu is None and None in [
        flags.figures[name] for name in ("bandwidth", "flops", "memory")
    ]
    here = here or (flags.gpu is not None and flags.gpu.lower() == THIS)
    model = read_model(flags.model, flags.dtype, on_this_machine=here)
    geometry, ranks = model.geometry, flags.num_ranks
    device = read_device(flags.gpu, flags.dtype, flags.figures, geometry.num_layers)
    try:
        cost = roofline_cost(geometry, device.rates(geometry.num_layers, ranks), ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    memory = MemoryPlan(model, device, ranks)
    if flags.kv_tokens is None:
        memory.check((1,), (1024,))
    engine = _engine(flags, memory.capacity_tokens, {})
    profile = roofline_profile(cost, flags.drafter)
    costs = ProfiledRoundCosts(profile, geometry, SpeculativeConfig())
    return Machine(costs, engine, f"roofline of {device.name} ({device.origin})")


def roofline_profile(cost: StepCost, drafter: str) -> StepProfile:
    """A round's steps by one roofline, for a drafter over the model's own weights.

    Its view is read from the pages and written to its copy once a round; `recycled` weighs every
    key, half of the K/V, once in refresh_rounds.
    """
    costs = {
        VERIFY: cost,
        PREFILL: cost,
        draft_kind(drafter): cost,
        begin_kind(drafter): StepCost(0.0, 0.0, 0.0, 2.0 * cost.per_kv_byte, 0.0, 0.0),
    }
    if drafter == "recycled":
        half = 0.5 * cost.per_kv_byte, 0.5 * cost.per_row_product
        costs[observe_kind(drafter)] = StepCost(0.0, 0.0, 0.0, *half, 0.0)
    return StepProfile(CostModel(costs))


def _engine(flags: MachineFlags, kv_tokens: int, settings: dict[str, Any]) -> EngineShape:
    """What was given, else the profile's settings, else the engine's defaults."""
    fields = {
        "total_kv_tokens": flags.kv_tokens,
        "max_num_seqs": flags.max_num_seqs,
        "max_batch_tokens": flags.max_batch_tokens,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    default = SchedulerConfig()
    return EngineShape(
        **{
            "total_kv_tokens": kv_tokens,
            "max_num_seqs": settings.get("max_num_seqs", default.max_num_seqs),
            "max_batch_tokens": settings.get("max_batch_tokens", default.max_batch_tokens),
            **given,
        },
        inter_token_target_s=flags.inter_token_target_s,
    )


def bounds(name: str, text: str) -> tuple[int, int]:
    """ "100:4000", or one number for both. Raises ConfigError."""
    found = _BOUNDS.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{name} must be LOW:HIGH or one number, got {text!r}")
    low = int(found[1])
    return low, int(found[2] or low)


def read_traffic(
    trace: Path | None, rate: float | None, fields: dict[str, Any]
) -> list[TraceRequest]:
    """A file's, or a Poisson stream's of those fields. Raises ConfigError."""
    if (trace is None) == (rate is None):
        raise ConfigError("give --trace FILE or --rate REQUESTS_PER_SECOND, one of them")
    try:
        if trace is not None:
            return read_trace(trace)
        return PoissonTraffic(requests_per_s=rate or 0.0, **fields).requests()
    except TraceError as error:
        raise ConfigError(str(error)) from error
