from magicdec.cluster.placement import replica_bundles
from magicdec.config import EngineConfig, ModelConfig, ParallelConfig


def bundles(num_ranks: int, *, use_gpu: bool) -> list[dict[str, float]]:
    config = EngineConfig(ModelConfig("model"), parallel=ParallelConfig(num_ranks))
    return replica_bundles(config, use_gpu=use_gpu)


def test_one_rank_shares_the_engines_bundle() -> None:
    assert [b.get("GPU", 0) for b in bundles(1, use_gpu=False)] == [0]
    assert [b.get("GPU", 0) for b in bundles(1, use_gpu=True)] == [1]


def test_more_ranks_have_a_bundle_each_after_the_engines() -> None:
    assert [b.get("GPU", 0) for b in bundles(4, use_gpu=True)] == [0, 1, 1, 1, 1]
    assert [b.get("GPU", 0) for b in bundles(4, use_gpu=False)] == [0] * 5


def test_a_sharded_replica_on_cpu_fits_two_cores_beside_the_application() -> None:
    assert sum(b["CPU"] for b in bundles(4, use_gpu=False)) <= 0.5
