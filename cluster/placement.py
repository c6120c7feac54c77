"""Where the ranks of a replica live: the engine's bundle first, then one bundle a rank."""

from dataclasses import dataclass

from magicdec.config import EngineConfig

# Logical shares: Ray admits by them and enforces nothing. On a CPU they are small, so that engine,
# ranks, router and ingress fit a laptop's two cores; a GPU host has cores to give to each rank.
ENGINE_CPUS = 0.1
RANK_CPUS_ON_CPU = 0.1
RANK_CPUS_ON_GPU = 1.0


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one replica meet: its own world, so that replicas share no group."""

    rank: int
    num_ranks: int
    master_address: str
    master_port: int
    use_gpu: bool

    def environment(self) -> dict[str, str]:
        """What DeepSpeed and torch.distributed read, DeepSpeed already when it is imported."""
        return {
            "RANK": str(self.rank),
            # Ray shows a rank one GPU alone, so the local device is 0 whatever the rank.
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            "DS_ACCELERATOR": "cuda" if self.use_gpu else "cpu",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }


def rank_resources(*, use_gpu: bool) -> dict[str, float]:
    """The bundle of one rank: one GPU, or a share of the host's cores."""
    if use_gpu:
        return {"CPU": RANK_CPUS_ON_GPU, "GPU": 1.0}
    return {"CPU": RANK_CPUS_ON_CPU}


def replica_bundles(config: EngineConfig, *, use_gpu: bool) -> list[dict[str, float]]:
    """The placement group of one replica.

    One rank lives in the engine's process, so the only bundle holds its GPU too. With more,
    bundle 0 is the engine, which computes nothing, and bundle i + 1 is rank i.
    """
    num_ranks = config.parallel.tensor_parallel_size
    if num_ranks == 1:
        resources = rank_resources(use_gpu=use_gpu)
        return [resources if use_gpu else {"CPU": ENGINE_CPUS}]
    ranks = [rank_resources(use_gpu=use_gpu) for _ in range(num_ranks)]
    return [{"CPU": ENGINE_CPUS}, *ranks]
