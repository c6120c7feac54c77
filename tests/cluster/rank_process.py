"""One rank without Ray: loads its shard of each model and saves what a test wants to compare.

python -m tests.cluster.rank_process RANK NUM_RANKS PORT OUTPUT DTYPE=FOLDER...
"""

import sys
from pathlib import Path

import numpy as np
import torch

from magicdec.sampler import Sampler, SamplerRow
from magicdec.types import SamplingParams
from magicdec.vocabulary import Vocabulary, even_bounds
from tests.cluster.joined_rank import joined_rank

WIDE = 3001


def main(rank: int, num_ranks: int, output: Path, *models: str) -> None:
    from magicdec.cluster.tensor_parallel import load_shard
    from magicdec.cluster.vocabulary_head import all_gather, find_head

    found = {}
    for model in models:
        dtype, _, folder = model.partition("=")
        module, vocabulary = load_shard(Path(folder), getattr(torch, dtype))
        with torch.inference_mode():
            logits = module(input_ids=sample_ids(), use_cache=False).logits[0]
        head = find_head(module)[1].weight.untyped_storage()
        embedding = module.get_parameter("model.embed_tokens.weight").untyped_storage()
        found[f"{Path(folder).name} {dtype}"] = {
            "share": tuple(logits.shape),
            "logits": vocabulary.join(logits)[None],
            "token_ids": Sampler([]).sample(logits, rows_of_every_kind(len(logits)), vocabulary),
            "head_bytes": 0 if head.data_ptr() == embedding.data_ptr() else head.nbytes(),
            "shapes": {
                name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)
            },
            "buffers": dict(module.named_buffers()),
        }
    vocabulary = Vocabulary(even_bounds(WIDE, num_ranks), rank, all_gather)
    part = wide_logits()[:, vocabulary.start : vocabulary.stop]
    rows = rows_of_every_kind(len(part))
    found["wide"] = {"token_ids": Sampler([]).sample(part, rows, vocabulary)}
    torch.save(found, output)


def wide_logits() -> torch.Tensor:
    """Of a vocabulary of which a rank sends its best alone: steep rows, flat ones, ties."""
    logits = torch.randn(40, WIDE, generator=torch.Generator().manual_seed(0))
    return (logits * torch.linspace(0.0, 8.0, 40)[:, None]).round(decimals=1)


def rows_of_every_kind(count: int) -> list[SamplerRow]:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=0.9, top_p=0.9, seed=2),
        SamplingParams(temperature=1.2, top_k=40, seed=3),
        SamplingParams(temperature=1.0, top_k=400, top_p=0.95, min_p=0.01, seed=4),
        SamplingParams(temperature=1.0, frequency_penalty=1.5, logit_bias=((300, 2.0),), seed=5),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
    ]
    history = np.arange(20, dtype=np.int64) * 17
    return [SamplerRow(kinds[i % len(kinds)], 20 + i, history, 10) for i in range(count)]


def sample_ids() -> torch.Tensor:
    return (torch.arange(40) * 7 % 250)[None]  # [1, 40]


if __name__ == "__main__":
    _, rank, num_ranks, port, output, *models = sys.argv
    with joined_rank(int(rank), int(num_ranks), int(port)):
        main(int(rank), int(num_ranks), Path(output), *models)
