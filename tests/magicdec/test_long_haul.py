"""32K tokens in and 4K out, with everything that may interrupt a stream on the way (T11)."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from magicdec.engine import Engine
from magicdec.types import Request, SamplingParams
from tests.conftest import EngineFactory, engine_config, save_model
from tests.generation import random_prompts, run_short_answers, token_ids

SHARED = 20_000  # prompt tokens that the second request has in common with the first
LENGTHS = (32_000, 24_011)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=40_960,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return save_model(tmp_path_factory.mktemp("long"), config)


def drive(engine: Engine, requests: list[Request], abort_after: int) -> dict[str, list[int]]:
    """The second request comes while the first decodes; a third is aborted in mid-answer."""
    answers: dict[str, list[int]] = {}
    engine.add(requests[0])
    steps = 0
    while engine.has_unfinished():
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(token_ids([output]))
        if len(answers.get("0", ())) > 0 and steps == 0:
            engine.add(requests[1])
            engine.add(replace(requests[1], request_id="aborted"))
            steps = 1
        if len(answers.get("aborted", ())) > abort_after:
            engine.abort("aborted")
            answers["aborted"] = []
        if steps % 100 == 0:
            engine.check_integrity()
    return answers


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_32k_in_and_4k_out_with_hits_aborts_and_preemption_give_the_plain_tokens(
    long_model: Path, make_engine: EngineFactory
) -> None:
    first, second = random_prompts(LENGTHS, seed=3)
    second[:SHARED] = first[:SHARED]
    requests = [
        Request(
            "0", tuple(first), SamplingParams(temperature=0.0, max_tokens=4096, ignore_eos=True)
        ),
        Request(
            "1",
            tuple(second),
            SamplingParams(temperature=1.0, seed=5, max_tokens=1024, ignore_eos=True),
        ),
    ]
    base = engine_config(long_model, block_size=64, num_blocks=2000, max_batch_tokens=1024)
    plain = drive(make_engine(base), requests, 10**9)
    for drafter, num_blocks in (("snapkv", 2000), ("recycled", 900)):
        config = engine_config(
            long_model,
            drafter=drafter,
            draft_length=4,
            draft_budget=256,
            block_size=64,
            num_blocks=num_blocks,  # 900: 57,600 tokens, too few for both answers
            max_batch_tokens=1024,
            prefix_caching=drafter == "snapkv",
        )
        engine = make_engine(config)
        run_short_answers(engine, max_tokens=4096)  # so that both are let in, and grow
        answers = drive(engine, requests, 40)
        assert (engine.stats.num_preemptions > 0) == (num_blocks == 900)
        assert answers["0"] == plain["0"]
        assert answers["1"] == plain["1"]
        assert engine.stats.num_draft_tokens > 2000
        cached = engine.stats.num_cached_tokens
        assert cached >= SHARED - 64 if drafter == "snapkv" else cached == 0
