"""Every drafter on two ranks: each keeps the selections of its own heads, and both draft alike."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group

from magicdec.cluster.executor import ShardedExecutor
from magicdec.cluster.placement import replica_bundles
from magicdec.config import DRAFTERS, DraftModelConfig, EngineConfig, ParallelConfig
from magicdec.engine import Engine
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import SamplingParams, SpeculationParams
from tests.cluster.shard_models import SHARDABLE
from tests.conftest import EngineFactory, engine_config, save_model
from tests.generation import random_prompts, requests_of, run, token_ids

SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=20, ignore_eos=True)


@pytest.fixture
def executor_of(request: pytest.FixtureRequest) -> Iterator[type[ShardedExecutor]]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ShardedExecutor
    ray.shutdown()


def sharded(config: EngineConfig) -> EngineConfig:
    return replace(config, parallel=ParallelConfig(tensor_parallel_size=2, num_threads=1))


def test_all_drafters_in_one_batch_give_the_tokens_of_one_rank(
    tmp_path: Path, executor_of: type[ShardedExecutor], make_engine: EngineFactory
) -> None:
    """The target drafts for itself as the draft model too: all of that one's tokens stand."""
    folder = save_model(tmp_path / "smollm2", SHARDABLE["smollm2"]())
    config = engine_config(
        folder,
        draft_length=4,
        num_blocks=100,
        draft_model=DraftModelConfig(str(folder), window=None),
    )
    prompts = random_prompts([90, 70, 100, 33, 64])
    requests = [
        replace(request, speculation=SpeculationParams(drafter=drafter))
        for request, drafter in zip(requests_of(prompts, SAMPLED), DRAFTERS, strict=True)
    ]
    plain = run(make_engine(engine_config(folder, num_blocks=100)), requests_of(prompts, SAMPLED))
    group = placement_group(replica_bundles(sharded(config), use_gpu=False), strategy="PACK")
    ray.get(group.ready(), timeout=30)
    executor = executor_of(sharded(config), group)
    engine = Engine(config, executor, load_tokenizer(str(folder)), read_model_facts(str(folder)))
    outputs = run(engine, requests)
    executor.shutdown()
    for request in requests:
        name = request.request_id
        assert token_ids(outputs[name]) == token_ids(plain[name])
    usages = {d: outputs[str(i)][-1].usage for i, d in enumerate(DRAFTERS)}
    drafted = usages["draft_model"]
    assert drafted.num_draft_tokens == drafted.num_accepted_tokens > 0
    for drafter in ("streaming", "snapkv", "recycled"):
        assert usages[drafter].num_draft_tokens > 0
        assert usages[drafter].drafter == drafter
