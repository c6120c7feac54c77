"""The profile of the real model against steps at shapes that it did not time."""

import math
import os
import statistics
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from magicdec.config import CacheConfig, EngineConfig, ModelConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.executor import LocalExecutor
from magicdec.profiling.profile import profile_executor
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.profiling.profile_samples import Hardware
from magicdec.roofline import ModelGeometry
from magicdec.types import SamplingParams

pytestmark = pytest.mark.slow

MAX_MODEL_LEN = 8192
NUM_SHAPES = 24


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def held_out(pool: ProbePool, random: Random) -> Iterator[Probe]:
    """Rounds without a refresh: plain, drafted by `ngram`, and by the model itself."""
    while True:
        drafter = random.choice(("ngram", "ngram", "streaming"))
        probe = Probe(
            batch_size=random.randint(1, 8),
            context_len=round(math.exp(random.uniform(math.log(150), math.log(3500)))),
            drafter=drafter,
            draft_length=random.randint(0, 8 if drafter == "ngram" else 3),
            draft_budget=random.choice((128, 256, 512)),
        )
        if pool.fits(probe):
            yield probe


def measure(executor: LocalExecutor, pool: ProbePool, probe: Probe) -> float:
    """Of one round; median of three after a first."""
    seconds = []
    for _ in range(4):
        result = executor.execute(pool.batch(probe, range(probe.batch_size), SamplingParams()))
        seconds.append(result.draft_seconds + result.verify_seconds)
    return statistics.median(seconds[1:])


def test_step_times_at_held_out_shapes_are_predicted() -> None:
    """Median error under 10 %, 95th percentile under 20 %, on a machine that does nothing else."""
    path = resolve_model(EMBEDDED_MODEL_NAME)
    config = EngineConfig(ModelConfig(path), CacheConfig(kv_cache_bytes=1 << 30))
    executor = LocalExecutor(config)
    device = executor.measure_device()
    geometry = ModelGeometry.from_config(
        AutoConfig.from_pretrained(path), weight_element_bytes=device.weight_element_bytes
    )
    hardware = Hardware(geometry, device.rates)
    profile = profile_executor(executor, config, MAX_MODEL_LEN, hardware)
    costs = ProfiledRoundCosts(profile, geometry, config.speculation)
    pool, shapes = ProbePool(config, executor.num_blocks, MAX_MODEL_LEN), Random(11)
    errors = []
    for probe, _ in zip(held_out(pool, shapes), range(NUM_SHAPES), strict=False):
        load = RoundLoad((probe.context_len,) * probe.batch_size)
        name, budget = probe.drafter or "", probe.draft_budget
        predicted = costs.seconds(load, name, probe.draft_length, budget)
        measured = measure(executor, pool, probe)
        errors.append(predicted / measured - 1.0)
        print(f"{probe}: {measured * 1e3:.0f} ms, predicted {errors[-1]:+.0%}")
    sizes = np.abs(errors)
    print(f"median error {np.median(sizes):.1%}, 95th percentile {np.quantile(sizes, 0.95):.1%}")
    assert np.median(sizes) < 0.10
    assert np.quantile(sizes, 0.95) < 0.20
