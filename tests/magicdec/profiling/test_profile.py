"""The start-up profile: what it learns, what it takes, and that it leaves nothing behind."""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from magicdec.batch import Batch, StepResult
from magicdec.config import (
    CacheConfig,
    DraftModelConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_costs import RoundLoad
from magicdec.cost_model import VERIFY
from magicdec.drafters.self_draft import SelfDrafter
from magicdec.engine import Engine
from magicdec.executor import Executor, LocalExecutor
from magicdec.profiling.device_rates import measure_device
from magicdec.profiling.profile import profile_executor
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.profiling.profile_samples import Hardware, profile_kinds
from magicdec.profiling.step_profile import StepProfile
from magicdec.roofline import ModelGeometry, roofline_cost
from magicdec.types import SamplingParams, SpeculationParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, token_ids
from tests.magicdec.profiling.planted_executor import DEVICE, GEOMETRY, PlantedExecutor

HARDWARE = Hardware(GEOMETRY, DEVICE)
CONFIG = EngineConfig(ModelConfig("planted"), CacheConfig(block_size=64))
MAX_MODEL_LEN = 8192
SELF_DRAFTERS = ("streaming", "snapkv", "recycled")


def planted(config: EngineConfig = CONFIG, num_blocks: int = 1000, **noise: Any) -> PlantedExecutor:
    return PlantedExecutor(config, num_blocks, MAX_MODEL_LEN, **noise)


def profile(executor: PlantedExecutor, seconds: float = 8.0) -> StepProfile:
    return profile_executor(
        executor, executor.config, executor.max_model_len, HARDWARE, seconds=seconds,
        clock=executor.clock,
    )  # fmt: skip


def held_out(seed: int, count: int = 60) -> Iterator[Probe]:
    """Rounds of decode rows at shapes of no grid."""
    random = Random(seed)
    pool = ProbePool(CONFIG, 1000, MAX_MODEL_LEN)
    while count > 0:
        name = random.choice(("ngram", *SELF_DRAFTERS))
        batch, context = random.randint(1, 16), round(math.exp(random.uniform(5.0, 8.9)))
        length, budget = random.randint(0, 16), round(math.exp(random.uniform(4.7, 7.0)))
        probe = Probe(batch, context, drafter=name, draft_length=length, draft_budget=budget)
        if pool.fits(probe):
            count -= 1
            yield probe


def errors(found: StepProfile, seed: int) -> list[float]:
    """Relative, of whole rounds that draft without observing; one step of each in turn."""
    executor = planted()
    pool = ProbePool(CONFIG, executor.num_blocks, MAX_MODEL_LEN)
    costs = ProfiledRoundCosts(found, GEOMETRY, CONFIG.speculation)
    wrong = []
    for probe in held_out(seed):
        if probe.drafter == "recycled":
            continue
        ids = tuple(range(probe.batch_size))
        before = executor.now
        executor.execute(pool.batch(probe, ids, SamplingParams()))
        load = RoundLoad((probe.context_len,) * probe.batch_size)
        name = probe.drafter or ""
        predicted = costs.seconds(load, name, probe.draft_length, probe.draft_budget)
        wrong.append(abs(predicted / (executor.now - before) - 1.0))
    return wrong


def test_rounds_at_shapes_that_were_not_timed_are_predicted() -> None:
    wrong = errors(profile(planted()), seed=1)
    assert statistics.median(wrong) < 0.04
    assert np.quantile(wrong, 0.95) < 0.15


def test_noise_and_stalled_steps_do_not_bend_the_profile() -> None:
    """5 % of noise, and one step in thirty that takes five times as long."""
    wrong = [
        error
        for seed in range(5)
        for error in errors(
            profile(planted(noise=0.05, stall_share=1 / 30, random=Random(seed))), seed
        )
    ]
    assert statistics.median(wrong) < 0.08
    assert np.quantile(wrong, 0.95) < 0.30


@pytest.mark.parametrize("stalled_step", [0, 1, 2, 5])
def test_one_stall_does_not_leave_the_other_shapes_out(stalled_step: int) -> None:
    """Two seconds of eight are lost by it, and no more is: what follows is not thought as slow."""

    class Stalling(PlantedExecutor):
        def execute(self, batch: Batch) -> StepResult:
            self.now += 2.0 if self.num_steps == stalled_step else 0.0
            return super().execute(batch)

    steady, stalling = planted(), Stalling(CONFIG, 1000, MAX_MODEL_LEN)
    profile(steady, 6.0)
    profile(stalling, 8.0)
    assert stalling.num_steps > 0.8 * steady.num_steps


def test_every_kind_of_step_has_a_cost() -> None:
    assert profile(planted()).model.costs.keys() == profile_kinds(CONFIG)


@pytest.mark.parametrize("seconds", [1.0, 3.0, 8.0, 60.0])
def test_a_profile_ends_in_time(seconds: float) -> None:
    """What one measurement takes beyond its estimate is all that it may be late by."""
    executor = planted()
    profile(executor, seconds)
    assert executor.num_steps > 0
    assert executor.now < 1.25 * seconds


def test_without_time_nothing_runs_and_the_roofline_stands() -> None:
    executor = planted()
    found = profile(executor, 0.0)
    assert executor.num_steps == 0
    assert found.model.cost(VERIFY) == roofline_cost(GEOMETRY, DEVICE)
    assert found.row_seconds == ()
    assert found.model.costs.keys() == profile_kinds(CONFIG)


def test_more_time_is_spent_on_more_shapes() -> None:
    few, many = planted(), planted()
    profile(few, 3.0)
    profile(many, 12.0)
    assert many.num_steps > 2 * few.num_steps


def test_drafters_know_no_sequence_of_a_profile_afterwards() -> None:
    executor = planted()
    profile(executor)
    assert executor.num_steps > 20
    assert not executor.known


@settings(deadline=None, max_examples=40)
@given(
    num_blocks=st.integers(1, 300),
    block_size=st.sampled_from([1, 8, 64, 256]),
    max_num_seqs=st.integers(1, 40),
    spare_tokens=st.integers(32, 600),
    max_draft_length=st.integers(0, 16),
    max_model_len=st.integers(2, 5000),
)
def test_batches_stay_within_scheduler_model_and_pool(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    spare_tokens: int,
    max_draft_length: int,
    max_model_len: int,
) -> None:
    """The executor refuses others; so tiny a pool may leave nothing to be timed."""
    config = EngineConfig(
        ModelConfig("planted"),
        CacheConfig(block_size=block_size),
        SchedulerConfig(max_num_seqs, max_num_seqs + spare_tokens),
        SpeculativeConfig(
            draft_length=min(4, max_draft_length),
            max_draft_length=max_draft_length,
            selection=SelectionConfig(refresh_rounds=1 + num_blocks % 4),
        ),
    )
    executor = PlantedExecutor(config, num_blocks, max_model_len)
    found = profile(executor, 4.0)
    assert found.model.costs.keys() == profile_kinds(config)
    assert not executor.known


def profile_engine(engine: Engine, draft_geometry: ModelGeometry | None = None) -> StepProfile:
    executor: Executor = engine._executor
    text = AutoConfig.from_pretrained(engine.config.model.path)
    device = executor.measure_device()
    geometry = ModelGeometry.from_config(text, weight_element_bytes=device.weight_element_bytes)
    hardware = Hardware(geometry, device.rates, draft_geometry)
    return profile_executor(executor, engine.config, engine.max_model_len, hardware, seconds=1.0)


@pytest.mark.parametrize("window", [None, 32])
def test_an_engine_answers_after_a_profile_as_if_there_had_been_none(
    tiny_model_dir: Path, make_engine: EngineFactory, window: int | None
) -> None:
    """Every drafter, the draft model with all of its K/V and with rings; no page counts as cached,
    and not one is lost."""
    draft_model = DraftModelConfig(str(tiny_model_dir), window)
    config = engine_config(tiny_model_dir, draft_length=4, draft_model=draft_model)
    names = (*SELF_DRAFTERS, "ngram", "draft_model")
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
    requests = [
        dataclasses.replace(request, speculation=SpeculationParams(drafter=name))
        for request, name in zip(
            requests_of(random_prompts([70, 40, 50, 33, 64]), sampling), names, strict=True
        )
    ]
    plain, profiled = make_engine(config), make_engine(config)
    found = profile_engine(profiled, GEOMETRY)
    assert found.model.costs.keys() == profile_kinds(config)
    profiled.check_integrity()
    assert isinstance(profiled._executor, LocalExecutor)
    drafter = profiled._executor._runner._drafters.by_name["recycled"]
    assert isinstance(drafter, SelfDrafter) and not drafter._selections
    expected, answers = run(plain, requests), run(profiled, requests)
    for request in requests:
        name = request.request_id
        assert token_ids(answers[name]) == token_ids(expected[name])
        usage, undisturbed = answers[name][-1].usage, expected[name][-1].usage
        assert usage == undisturbed
        assert usage.cached_tokens == 0


def test_a_device_has_rates_and_a_name() -> None:
    device = measure_device(torch.device("cpu"), torch.float32, 4)
    assert device.name and device.num_threads == torch.get_num_threads()
    assert device.weight_element_bytes == 4
    assert 1e8 < device.rates.bandwidth < 1e13
    assert 1e8 < device.rates.arithmetic < 1e16
    assert device.rates.memory_bytes > 1 << 28
