"""The real model at length: speculative tokens are plain tokens, and plain tokens generate's."""

import inspect
import os
import turtle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import SamplingParams
from tests.conftest import engine_config
from tests.generation import generate_reference, requests_of, run, token_ids

pytestmark = pytest.mark.slow

LENGTHS = (700, 1500, 2900)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=48),
    SamplingParams(temperature=0.8, top_p=0.95, seed=11, max_tokens=48),
    SamplingParams(temperature=1.0, seed=12, repetition_penalty=1.1, max_tokens=48),
]


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def build(path: str, draft_length: int) -> Engine:
    config = engine_config(
        Path(path),
        draft_length=draft_length,
        draft_budget=256,
        num_sink_tokens=16,
        block_size=64,
        num_blocks=120,
        max_batch_tokens=512,
    )
    return Engine(config, LocalExecutor(config), load_tokenizer(path), read_model_facts(path))


def test_the_embedded_model_decodes_the_same_tokens_with_and_without_a_draft() -> None:
    path = resolve_model(EMBEDDED_MODEL_NAME)
    ids = load_tokenizer(path)(inspect.getsource(turtle))["input_ids"]
    assert isinstance(ids, list)
    requests = requests_of([ids[:n] for n in LENGTHS], SAMPLINGS)
    answers = []
    for draft_length in (0, 4):
        engine = build(path, draft_length)
        outputs = run(engine, requests)
        answers.append([token_ids(outputs[r.request_id]) for r in requests])
    assert answers[0] == answers[1]
    assert engine.stats.mean_acceptance_length > 2.0
    assert answers[0][0] == generate_reference(Path(path), ids[: LENGTHS[0]], 48)
