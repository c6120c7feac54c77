"""One rank without Ray that sizes its KV pool by a memory that is made up.

python -m tests.cluster.memory_process RANK NUM_RANKS PORT TOTAL_BYTES FOLDER
"""

import os
import sys
from pathlib import Path

import torch

from magicdec.cluster.placement import Rendezvous
from magicdec.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from magicdec.model_loader import describe_model
from magicdec.runner import ModelRunner
from tests.device_memory import FakeMemory


def main(rank: int, num_ranks: int, port: int, total_bytes: int, folder: str) -> None:
    rendezvous = Rendezvous(rank, num_ranks, "127.0.0.1", port, use_gpu=False)
    os.environ.update(rendezvous.environment())
    from magicdec.cluster.tensor_parallel import join_process_group, load_shard

    torch.set_num_threads(1)
    join_process_group(rendezvous)
    config = EngineConfig(
        ModelConfig(folder, "float32"),
        CacheConfig(block_size=8),
        SchedulerConfig(max_num_seqs=4, max_batch_tokens=96),
        parallel=ParallelConfig(tensor_parallel_size=num_ranks),
    )
    module, vocabulary = load_shard(Path(folder), torch.float32)
    model = describe_model(module, "float32", vocabulary)
    runner = ModelRunner(model, config, FakeMemory(total_bytes))
    print("blocks", runner.num_affordable_blocks())


if __name__ == "__main__":
    _, rank, num_ranks, port, total_bytes, folder = sys.argv
    main(int(rank), int(num_ranks), int(port), int(total_bytes), folder)
