"""The start-up profile over two ranks: they measure as one, and answer afterwards as before."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from transformers import AutoConfig

from magicdec.cluster.executor import ShardedExecutor
from magicdec.config import ParallelConfig
from magicdec.cost_model import VERIFY
from magicdec.engine import Engine
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.profiling.profile import profile_executor
from magicdec.profiling.profile_samples import Hardware, profile_kinds
from magicdec.roofline import ModelGeometry, roofline_cost
from magicdec.types import SamplingParams
from tests.cluster.shard_models import SHARDABLE
from tests.conftest import EngineFactory, engine_config, save_model
from tests.generation import random_prompts, requests_of, run, token_ids

pytestmark = pytest.mark.slow


@pytest.fixture
def executor_of() -> Iterator[type[ShardedExecutor]]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ShardedExecutor
    ray.shutdown()


def test_ranks_are_profiled_together_and_answer_as_before(
    tmp_path: Path, executor_of: type[ShardedExecutor], make_engine: EngineFactory
) -> None:
    folder = str(save_model(tmp_path / "smollm2", SHARDABLE["smollm2"]()))
    config = engine_config(Path(folder), draft_length=3, num_blocks=100, drafter="recycled")
    sampling = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True)
    requests = requests_of(random_prompts([90, 70, 33]), sampling)
    expected = run(make_engine(config), requests)
    parallel = ParallelConfig(tensor_parallel_size=2, num_threads=1)
    executor = executor_of(replace(config, parallel=parallel))
    engine = Engine(
        replace(config, parallel=parallel),
        executor,
        load_tokenizer(folder),
        read_model_facts(folder),
    )
    device = executor.measure_device()
    assert device.num_threads == 1 and device.weight_element_bytes == 4
    hardware = Hardware(ModelGeometry.from_config(AutoConfig.from_pretrained(folder)), device.rates)
    profile = profile_executor(executor, engine.config, engine.max_model_len, hardware, seconds=2.0)
    assert profile.model.costs.keys() == profile_kinds(config)
    assert profile.model.cost(VERIFY) != roofline_cost(hardware.geometry, device.rates, 2)
    answers = run(engine, requests)
    engine.shutdown()
    for request in requests:
        name = request.request_id
        assert token_ids(answers[name]) == token_ids(expected[name])
        assert answers[name][-1].usage.cached_tokens == 0
