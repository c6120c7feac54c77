"""One rank without Ray: loads its shard of each model and saves what a test wants to compare.

python -m tests.cluster.rank_process RANK NUM_RANKS PORT OUTPUT DTYPE=FOLDER...
"""

import os
import sys
from pathlib import Path

import torch

from magicdec.cluster.placement import Rendezvous


def main(rank: int, num_ranks: int, port: int, output: Path, *models: str) -> None:
    rendezvous = Rendezvous(rank, num_ranks, "127.0.0.1", port, use_gpu=False)
    os.environ.update(rendezvous.environment())
    from magicdec.cluster.tensor_parallel import join_process_group, load_shard

    torch.set_num_threads(1)
    join_process_group(rendezvous)
    found = {}
    for model in models:
        dtype, _, folder = model.partition("=")
        module = load_shard(Path(folder), getattr(torch, dtype))
        with torch.inference_mode():
            logits = module(input_ids=sample_ids(), use_cache=False).logits
        found[f"{Path(folder).name} {dtype}"] = {
            "logits": logits,
            "shapes": {
                name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)
            },
            "buffers": dict(module.named_buffers()),
        }
    torch.save(found, output)


def sample_ids() -> torch.Tensor:
    return (torch.arange(40) * 7 % 250)[None]  # [1, 40]


if __name__ == "__main__":
    _, rank, num_ranks, port, output, *models = sys.argv
    main(int(rank), int(num_ranks), int(port), Path(output), *models)
