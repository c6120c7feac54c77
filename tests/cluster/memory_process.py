"""One rank without Ray that sizes its KV pool by a memory that is made up.

python -m tests.cluster.memory_process RANK NUM_RANKS PORT TOTAL_BYTES FOLDER
"""

import sys
from pathlib import Path

import torch

from magicdec.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from magicdec.model_loader import describe_model
from magicdec.runner import ModelRunner
from tests.cluster.joined_rank import joined_rank
from tests.device_memory import FakeMemory


def main(num_ranks: int, total_bytes: int, folder: str) -> None:
    from magicdec.cluster.tensor_parallel import load_shard

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
    with joined_rank(int(rank), int(num_ranks), int(port)):
        main(int(num_ranks), int(total_bytes), folder)
