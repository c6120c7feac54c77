"""Speculative tokens are the plain ones: whatever is drafted, sampled, preempted or resumed."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.config import EngineConfig
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import FinishReason, Request, SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, run_short_answers, text, token_ids

PROMPTS = random_prompts([2, 7, 8, 9, 40, 63, 64, 65, 130])
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=21, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=2, max_tokens=19, ignore_eos=True),
    SamplingParams(temperature=1.3, top_k=20, seed=2**64 - 1, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=1.0, min_p=0.1, seed=4, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=16, ignore_eos=True),
    SamplingParams(
        temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5, seed=5, max_tokens=15
    ),
    SamplingParams(temperature=0.5, logit_bias=((7, 4.0), (9, -100.0)), seed=6, max_tokens=14),
    SamplingParams(temperature=1.0, seed=7, max_tokens=13, min_tokens=13),
]


def plain_tokens(path: Path, requests: list[Request]) -> list[list[int]]:
    """Each request alone, draft length 0, no chunk, no preemption."""
    config = engine_config(path, num_blocks=40, max_batch_tokens=512)
    answers = []
    for request in requests:
        engine = build(config)
        answers.append(token_ids(run(engine, [request])[request.request_id]))
    return answers


def build(config: EngineConfig) -> Engine:
    path = config.model.path
    return Engine(config, LocalExecutor(config), load_tokenizer(path), read_model_facts(path))


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[list[int]]:
    return plain_tokens(tiny_model_dir, requests_of(PROMPTS, SAMPLINGS))


@pytest.mark.parametrize("draft_length", range(9))
def test_every_draft_length_gives_the_plain_tokens(
    draft_length: int, expected: list[list[int]], tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(
        engine_config(
            tiny_model_dir, draft_length=draft_length, num_blocks=100, max_batch_tokens=90
        )
    )
    outputs = run(engine, requests_of(PROMPTS, SAMPLINGS))
    assert [token_ids(outputs[str(i)]) for i in range(len(PROMPTS))] == expected
    assert (engine.stats.num_draft_tokens > 0) == (draft_length > 0)


@pytest.mark.parametrize("draft_budget", [13, 16, 64, 400])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_every_budget_and_page_size_gives_the_plain_tokens(
    draft_budget: int,
    block_size: int,
    expected: list[list[int]],
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    engine = make_engine(
        engine_config(
            tiny_model_dir,
            draft_length=4,
            draft_budget=draft_budget,
            block_size=block_size,
            num_blocks=1024 // block_size,
        )
    )
    outputs = run(engine, requests_of(PROMPTS, SAMPLINGS))
    assert [token_ids(outputs[str(i)]) for i in range(len(PROMPTS))] == expected


def test_a_view_of_the_whole_context_is_accepted_whole(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """The draft then sees what the target sees: every token stands, sampled or greedy."""
    engine = make_engine(engine_config(tiny_model_dir, draft_length=4, draft_budget=400))
    requests = requests_of(PROMPTS[:5], SAMPLINGS[:5])
    outputs = run(engine, requests)
    for request in requests:
        usage = outputs[request.request_id][-1].usage
        assert usage.num_draft_tokens == usage.num_accepted_tokens > 0


@pytest.mark.parametrize("draft_length", [0, 5])
def test_preemption_changes_no_token(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """Five sequences that each fit grow until the pool holds two of them."""
    samplings = [
        SamplingParams(temperature=t, seed=i, max_tokens=70, ignore_eos=True)
        for i, t in enumerate([0.0, 0.5, 1.0, 1.0, 0.0])
    ]
    requests = requests_of(random_prompts([9, 10, 11, 12, 13], seed=1), samplings)
    engine = make_engine(engine_config(tiny_model_dir, draft_length=draft_length, num_blocks=24))
    run_short_answers(engine, max_tokens=70)
    outputs = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    answers = [token_ids(outputs[r.request_id]) for r in requests]
    assert answers == plain_tokens(tiny_model_dir, requests)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_journal_resumes_on_another_engine_without_losing_or_repeating_a_token(
    cut: int, expected: list[list[int]], tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=3, num_blocks=100))
    resumed = [
        Request(r.request_id, r.prompt_token_ids, r.sampling, tuple(tokens[:cut]))
        for r, tokens in zip(requests_of(PROMPTS, SAMPLINGS), expected, strict=True)
    ]
    outputs = run(engine, resumed)
    for request, tokens in zip(resumed, expected, strict=True):
        last = outputs[request.request_id][-1]
        assert token_ids(outputs[request.request_id]) == tokens[cut:]
        assert last.usage.completion_tokens == len(tokens)


def test_a_journal_that_ends_the_request_finishes_without_a_step(
    expected: list[list[int]], tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir))
    request = Request("r", tuple(PROMPTS[0]), SAMPLINGS[0], tuple(expected[0]))
    (output,) = run(engine, [request])["r"]
    assert output.token_ids == ()
    assert output.finish_reason is FinishReason.LENGTH


def test_resumed_text_continues_where_the_first_engine_stopped(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=30, stop=("zzzz", "\x00\x01"))
    prompt = tuple(PROMPTS[4])
    whole = run(make_engine(engine_config(tiny_model_dir)), [Request("a", prompt, sampling)])["a"]
    for cut in range(0, len(whole), 3):
        journal = tuple(token_ids(whole[:cut]))
        engine = make_engine(engine_config(tiny_model_dir, draft_length=2))
        rest = run(engine, [Request("a", prompt, sampling, journal)])["a"]
        assert text(whole[:cut]) + text(rest) == text(whole)


@settings(max_examples=12, deadline=None)
@given(
    draft_length=st.integers(0, 6),
    draft_budget=st.integers(12, 80),
    num_blocks=st.integers(20, 70),
    max_num_seqs=st.integers(1, 6),
    max_batch_tokens=st.integers(38, 130),
    arrivals=st.lists(st.integers(0, 20), min_size=len(PROMPTS), max_size=len(PROMPTS)),
    cancellations=st.dictionaries(st.integers(0, len(PROMPTS) - 1), st.integers(0, 30), max_size=3),
)
def test_any_arrival_order_cancellation_and_pool_size_gives_the_plain_tokens(
    draft_length: int,
    draft_budget: int,
    num_blocks: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    arrivals: list[int],
    cancellations: dict[int, int],
    expected: list[list[int]],
    tiny_model_dir: Path,
) -> None:
    """`arrivals` and `cancellations` give the step at which a request comes and goes."""
    config = engine_config(
        tiny_model_dir,
        draft_length=draft_length,
        draft_budget=draft_budget,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
    )
    engine = build(config)
    requests = requests_of(PROMPTS, SAMPLINGS)
    tokens: list[list[int]] = [[] for _ in requests]
    for step in range(2000):
        for i, request in enumerate(requests):
            if arrivals[i] == step:
                engine.add(request)
            if cancellations.get(i) == step:
                engine.abort(request.request_id)
                engine.check_integrity()
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        engine.check_integrity()
        if step > 30 and not engine.has_unfinished():
            break
    assert engine.load().free_kv_tokens == engine.load().total_kv_tokens
    for i, whole in enumerate(expected):
        cancelled = i in cancellations and cancellations[i] >= arrivals[i]
        assert tokens[i] == (whole[: len(tokens[i])] if cancelled else whole)
