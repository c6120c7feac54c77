"""Engines and traffic of the simulation's tests."""

from typing import Any

from magicdec.config import SpeculativeConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.cost_model import VERIFY, CostModel, StepCost, draft_kind
from magicdec.profiling.step_profile import PREFILL, StepProfile
from magicdec.roofline import ModelGeometry
from magicdec.routing.settings import AdmissionConfig
from magicdec.simulation.simulator import ClusterConfig
from magicdec.simulation.steps import EngineShape

# An 8B model on a fast GPU: 5 ms for the weights, 30 us a row, 128 KiB of KV a token at 3 TB/s.
GEOMETRY = ModelGeometry(32, 4096, 32, 8, 128, 14336, 128256)
FORWARD = StepCost(1e-3, 5e-3, 3e-5, 1 / 3e12, 1e-9, 2e-5)
DRAFT = StepCost(5e-4, 5e-3, 3e-5, 1 / 3e12, 1e-9, 2e-5)
PROFILE = StepProfile(CostModel({VERIFY: FORWARD, PREFILL: FORWARD, draft_kind("recycled"): DRAFT}))
COSTS = ProfiledRoundCosts(PROFILE, GEOMETRY, SpeculativeConfig())
ENGINE = EngineShape(total_kv_tokens=400_000, max_num_seqs=64, max_batch_tokens=2048)


def cluster(num_replicas: int, engine: EngineShape = ENGINE, **admission: Any) -> ClusterConfig:
    return ClusterConfig(num_replicas, engine, AdmissionConfig(**admission))


class Linear:
    """1 ms, 10 us a row of prefill, 1 us a token of context read, 0.1 ms a row of a draft step."""

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        seconds = 1e-3 + 1e-5 * load.num_prefill_rows + 1e-6 * sum(load.context_lens)
        return seconds + 1e-4 * draft_length * len(load.context_lens)


class Constant:
    """A tenth of a second, whatever is done."""

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        return 0.1
