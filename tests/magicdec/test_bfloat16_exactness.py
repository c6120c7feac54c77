"""In bfloat16 too, drafted streams are the plain ones: no row's result depends on its neighbours.

Where the processor multiplies in bfloat16 itself, torch's linears make no such promise.
"""

from pathlib import Path

import pytest
import torch

from magicdec.compute_dtype import packing_library
from magicdec.types import SamplingParams
from tests.conftest import FAMILIES, EngineFactory, engine_config, save_model
from tests.generation import random_prompts, requests_of, run, token_ids

pytestmark = pytest.mark.skipif(
    packing_library("bfloat16", torch.device("cpu")) is None,
    reason="linears are torch's here",
)
SAMPLINGS = [
    SamplingParams(temperature=temperature, seed=i, max_tokens=40, ignore_eos=True)
    for i, temperature in enumerate((0.0, 0.0, 0.7, 1.0, 1.0, 1.3))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = FAMILIES["llama"]()
    config.head_dim = 32
    return save_model(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.mark.parametrize(
    ("drafter", "draft_length"), [("streaming", 1), ("snapkv", 3), ("recycled", 7), ("ngram", 5)]
)
def test_drafted_streams_equal_plain_ones(
    folder: Path, make_engine: EngineFactory, drafter: str, draft_length: int
) -> None:
    requests = requests_of(random_prompts((9, 30, 70, 120, 150, 200)), SAMPLINGS)
    streams = []
    for length in (0, draft_length):
        config = engine_config(
            folder,
            draft_length=length,
            drafter=drafter,
            draft_budget=32,
            dtype="bfloat16",
            max_batch_tokens=1024,
            num_blocks=400,
        )
        engine = make_engine(config)
        outputs = run(engine, requests)
        streams.append([token_ids(outputs[request.request_id]) for request in requests])
    assert streams[0] == streams[1]
    assert engine.stats.num_draft_tokens > 0
