"""Two rank actors under real Ray: the same tokens as one rank, and a quick end when one dies."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from ray.util.placement_group import placement_group, remove_placement_group

from magicdec.attention import UnsupportedModel
from magicdec.batch import Batch, ScheduledSequence
from magicdec.cluster.executor import ShardedExecutor
from magicdec.cluster.placement import replica_bundles
from magicdec.config import CacheConfig, EngineConfig, ParallelConfig
from magicdec.control.round_policy import FixedPolicy
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.engine import Engine
from magicdec.executor import Executor, ExecutorError, LocalExecutor
from magicdec.kv_cache import num_affordable_blocks
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import SamplingParams
from tests.cluster.shard_models import REFUSED, SHARDABLE
from tests.conftest import EngineFactory, engine_config, save_model
from tests.generation import generate_reference, random_prompts, requests_of, run, token_ids
from tests.processes import live_ranks

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=20)
PROMPTS = random_prompts([1, 5, 33, 90])
KV_CACHE_BYTES = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def sharded_config(folder: Path) -> EngineConfig:
    config = engine_config(folder, draft_length=4, num_blocks=64)
    return replace(config, parallel=ParallelConfig(tensor_parallel_size=2, num_threads=1))


@pytest.fixture(scope="module")
def start(ray_session: None) -> Iterator[Callable[[EngineConfig], ShardedExecutor]]:
    groups, executors = [], []

    def start_in_a_placement_group(config: EngineConfig) -> ShardedExecutor:
        group = placement_group(replica_bundles(config, use_gpu=False), strategy="PACK")
        groups.append(group)
        ray.get(group.ready(), timeout=30)
        executors.append(ShardedExecutor(config, group))
        return executors[-1]

    yield start_in_a_placement_group
    for executor in executors:
        executor.shutdown()
    for group in groups:
        remove_placement_group(group)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """9 query and 3 KV heads on two ranks, tied embeddings."""
    folder = save_model(tmp_path_factory.mktemp("models") / "smollm2", SHARDABLE["smollm2"]())
    return sharded_config(folder)


@pytest.fixture(scope="module")
def smollm2_executor(
    smollm2: EngineConfig, start: Callable[[EngineConfig], ShardedExecutor]
) -> ShardedExecutor:
    return start(smollm2)


@pytest.fixture(scope="module")
def multi_query(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """One KV head on two ranks: rank 1 holds no head and no KV cache."""
    config = SHARDABLE["multi_query"]()
    folder = save_model(tmp_path_factory.mktemp("models") / "multi_query", config)
    cache = CacheConfig(block_size=8, kv_cache_bytes=KV_CACHE_BYTES)
    return replace(sharded_config(folder), cache=cache)


@pytest.fixture(scope="module")
def multi_query_executor(
    multi_query: EngineConfig, start: Callable[[EngineConfig], ShardedExecutor]
) -> ShardedExecutor:
    return start(multi_query)


def engine_on(executor: Executor, config: EngineConfig, draft_length: int) -> Engine:
    path = config.model.path
    plan = FixedPolicy.of(config.speculation).plan
    policy = FixedPolicy(replace(plan, draft_length=draft_length))
    return Engine(config, executor, load_tokenizer(path), read_model_facts(path), policy)


@pytest.mark.parametrize("draft_length", [0, 4])
def test_uneven_heads_give_the_tokens_of_generate(
    draft_length: int, smollm2: EngineConfig, smollm2_executor: ShardedExecutor
) -> None:
    engine = engine_on(smollm2_executor, smollm2, draft_length)
    outputs = run(engine, requests_of(PROMPTS, GREEDY))
    for i, prompt in enumerate(PROMPTS):
        expected = generate_reference(Path(smollm2.model.path), prompt, GREEDY.max_tokens)
        assert token_ids(outputs[str(i)]) == expected
    assert (engine.stats.num_draft_tokens > 0) == (draft_length > 0)


def test_sampled_tokens_are_those_of_one_rank(
    smollm2: EngineConfig, smollm2_executor: ShardedExecutor, make_engine: EngineFactory
) -> None:
    sharded = run(engine_on(smollm2_executor, smollm2, 4), requests_of(PROMPTS, SAMPLED))
    whole = run(make_engine(smollm2), requests_of(PROMPTS, SAMPLED))
    for i in range(len(PROMPTS)):
        assert token_ids(sharded[str(i)]) == token_ids(whole[str(i)])


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_rank_without_heads_changes_nothing(
    draft_length: int, multi_query: EngineConfig, multi_query_executor: ShardedExecutor
) -> None:
    engine = engine_on(multi_query_executor, multi_query, draft_length)
    outputs = run(engine, requests_of(PROMPTS[2:], GREEDY))
    for i, prompt in enumerate(PROMPTS[2:]):
        expected = generate_reference(Path(multi_query.model.path), prompt, GREEDY.max_tokens)
        assert token_ids(outputs[str(i)]) == expected


def test_block_count_is_the_smallest_over_the_ranks(
    multi_query: EngineConfig, multi_query_executor: ShardedExecutor
) -> None:
    bytes_per_token = 2 * 4 * 4 * 32  # K and V, fp32, 4 layers, one head of 32: rank 0's share
    assert multi_query_executor.num_blocks == KV_CACHE_BYTES // (bytes_per_token * 8)
    assert num_affordable_blocks((), torch.float32, multi_query.cache) > 2**30  # rank 1's view


def test_a_failing_step_says_which_rank_and_why_and_ends_the_executor(
    smollm2_executor: ShardedExecutor,
) -> None:
    """Runs after the tests above: the executor is of no use afterwards."""
    unknown_token = batch_of(np.array([10**6]))
    with pytest.raises(ExecutorError, match=r"rank \d failed: IndexError"):
        smollm2_executor.execute(unknown_token)
    with pytest.raises(ExecutorError, match=r"rank \d failed: IndexError"):
        smollm2_executor.execute(batch_of(np.array([1])))


def test_a_killed_rank_ends_the_step_within_two_seconds(
    multi_query: EngineConfig, multi_query_executor: ShardedExecutor
) -> None:
    victims = live_ranks()
    killed_at: list[float] = []

    def kill() -> None:
        time.sleep(0.5)
        killed_at.append(time.monotonic())
        victims[-1].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ExecutorError, match="rank"):
        while True:
            multi_query_executor.execute(batch_of(np.arange(64)))
    ended_at = time.monotonic()
    killer.join()
    assert ended_at - killed_at[0] < 2.0
    with pytest.raises(ExecutorError):
        multi_query_executor.execute(batch_of(np.array([1])))
    deadline = time.monotonic() + 10
    while live_ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not live_ranks()


def test_a_model_that_cannot_be_split_is_refused_at_start(
    tmp_path: Path, start: Callable[[EngineConfig], ShardedExecutor]
) -> None:
    folder = save_model(tmp_path / "phi3", REFUSED["phi3"][0]())
    with pytest.raises(UnsupportedModel, match=r"qkv_proj: .*tensor_parallel_size 1"):
        start(sharded_config(folder))


@pytest.mark.slow
def test_the_embedded_model_on_two_ranks_gives_one_ranks_tokens(
    start: Callable[[EngineConfig], ShardedExecutor],
) -> None:
    config = sharded_config(Path(resolve_model(EMBEDDED_MODEL_NAME)))
    cache = CacheConfig(block_size=64, num_blocks=40)
    config = replace(config, cache=cache)
    prompts = random_prompts([900, 300, 7], vocab_size=40_000)
    requests = requests_of(prompts, [GREEDY, SAMPLED, GREEDY])
    sharded = run(engine_on(start(config), config, 4), requests)
    whole = run(engine_on(LocalExecutor(config), config, 0), requests)
    for request in requests:
        name = request.request_id
        assert token_ids(sharded[name]) == token_ids(whole[name])


def batch_of(token_ids: NDArray[np.int64]) -> Batch:
    sequence = ScheduledSequence(
        sequence_id=0,
        token_ids=token_ids,
        num_computed_tokens=0,
        block_table=np.arange(10),
        sampling=GREEDY,
        num_prompt_tokens=len(token_ids),
        history=None,
        draft=None,
    )
    return Batch((sequence,))
