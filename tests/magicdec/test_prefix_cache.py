"""Prompts that begin alike share blocks, and nobody's tokens change by it."""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magicdec.block_pool import BlockPool
from magicdec.config import EngineConfig
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.prefix_cache import PrefixCache
from magicdec.sequence import Sequence
from magicdec.types import Request, SamplingParams, Usage
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, run, run_short_answers, token_ids

BLOCK_SIZE = 8
(TEXT,) = random_prompts([200], seed=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
DRAFT_LENGTHS = pytest.mark.parametrize("draft_length", [0, 4])
PlainTokens = Callable[[Tokens[int], SamplingParams], list[int]]


def uncached(config: EngineConfig) -> EngineConfig:
    return replace(config, cache=replace(config.cache, prefix_caching=False))


def ask(
    engine: Engine, prompt: Tokens[int], sampling: SamplingParams, journal: Tokens[int] = ()
) -> tuple[list[int], Usage]:
    request = Request("r", tuple(prompt), sampling, tuple(journal))
    outputs = run(engine, [request])["r"]
    return token_ids(outputs), outputs[-1].usage


@pytest.fixture(scope="module")
def plain_tokens(tiny_model_dir: Path) -> PlainTokens:
    """Answers of an engine without drafts and without the cache."""
    config, path = uncached(engine_config(tiny_model_dir)), str(tiny_model_dir)
    engine = Engine(config, LocalExecutor(config), load_tokenizer(path), read_model_facts(path))
    return lambda prompt, sampling: ask(engine, prompt, sampling)[0]


@DRAFT_LENGTHS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_prompt_asked_again_is_served_from_its_blocks_with_equal_tokens(
    draft_length: int,
    sampling: SamplingParams,
    plain_tokens: PlainTokens,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    """Whole blocks, and 32 tokens at least stay to be computed."""
    engine = make_engine(engine_config(tiny_model_dir, draft_length=draft_length))
    lengths = (31, 32, 39, 40, 41, 64, 100)
    for prompt in random_prompts(lengths, seed=9):
        first, cold = ask(engine, prompt, sampling)
        again, warm = ask(engine, prompt, sampling)
        assert first == again == plain_tokens(prompt, sampling)
        cached = max(len(prompt) - 32, 0) // BLOCK_SIZE * BLOCK_SIZE
        assert (cold.cached_tokens, warm.cached_tokens) == (0, cached)
    stats = engine.stats
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (2 * 347, 8 + 8 + 32 + 64)
    assert stats.num_prefill_tokens == stats.num_prompt_tokens - stats.num_cached_tokens
    assert stats.prefix_hit_rate == 112 / 694


@DRAFT_LENGTHS
def test_a_conversation_goes_on_from_the_blocks_of_its_own_answer(
    draft_length: int,
    plain_tokens: PlainTokens,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    """Answer tokens were verified, not prefilled: their blocks serve all the same."""
    config = engine_config(tiny_model_dir, draft_length=draft_length, draft_budget=200)
    engine = make_engine(config)
    sampling = replace(GREEDY, max_tokens=60)
    answer, _ = ask(engine, TEXT[:40], sampling)
    longer = [*TEXT[:40], *answer, *TEXT[40:80]]
    tokens, usage = ask(engine, longer, SAMPLED)
    # The last answer token was emitted, never computed.
    assert usage.cached_tokens == (40 + 60 - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert tokens == plain_tokens(longer, SAMPLED)


@DRAFT_LENGTHS
def test_prompts_share_as_far_as_they_agree(
    draft_length: int,
    plain_tokens: PlainTokens,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    config = engine_config(tiny_model_dir, draft_length=draft_length)
    engine = make_engine(config)
    ask(engine, TEXT[:120], GREEDY)
    for agree, cached in ((7, 0), (8, 8), (50, 48), (88, 88), (120, 120)):
        prompt = TEXT[:agree] + [(t + 1) % 256 for t in TEXT[agree : agree + 60]]
        tokens, usage = ask(engine, prompt, SAMPLED)
        assert usage.cached_tokens == cached
        assert tokens == plain_tokens(prompt, SAMPLED)


@DRAFT_LENGTHS
def test_identical_prompts_at_once_answer_alike_and_leave_one_copy(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=draft_length))
    prompt = tuple(TEXT[:100])
    outputs = run(engine, [Request(name, prompt, SAMPLED) for name in "abc"])
    answers = [token_ids(outputs[name]) for name in "abc"]
    assert answers[0] == answers[1] == answers[2] == ask(engine, prompt, SAMPLED)[0]
    assert engine.stats.num_cached_tokens >= 64


@DRAFT_LENGTHS
def test_a_preempted_sequence_finds_its_blocks_and_its_usage_stays(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, draft_length=draft_length, num_blocks=24)
    requests = [
        Request(str(i), tuple(p), replace(SAMPLED, seed=i, max_tokens=70))
        for i, p in enumerate(random_prompts([29, 30, 41, 52], seed=1))
    ]
    prefilled, answers = [], []
    for each in (config, uncached(config)):
        engine = make_engine(each)
        run_short_answers(engine, max_tokens=70)
        outputs = run(engine, requests)
        assert engine.stats.num_preemptions > 0
        assert all(outputs[r.request_id][-1].usage.cached_tokens == 0 for r in requests)
        answers.append([token_ids(outputs[r.request_id]) for r in requests])
        prefilled.append(engine.stats.num_prefill_tokens)
    assert answers[0] == answers[1]
    assert prefilled[0] < prefilled[1]


def test_a_journal_resumes_on_cached_blocks_and_only_the_prompt_counts(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=4))
    sampling = replace(SAMPLED, max_tokens=80)
    whole, _ = ask(engine, TEXT[:40], sampling)
    before = engine.stats.num_prefill_tokens
    rest, usage = ask(engine, TEXT[:40], sampling, journal=whole[:60])
    assert rest == whole[60:]
    assert usage.cached_tokens == 40
    assert engine.stats.num_prefill_tokens - before == 100 - (100 - 32) // BLOCK_SIZE * BLOCK_SIZE


@DRAFT_LENGTHS
def test_a_small_pool_evicts_and_every_answer_stays_right(
    draft_length: int,
    plain_tokens: PlainTokens,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    config = engine_config(tiny_model_dir, draft_length=draft_length, num_blocks=22)
    engine = make_engine(config)
    prompts = [TEXT[i : i + 60] for i in range(5)]
    expected = [plain_tokens(p, GREEDY) for p in prompts]
    for i in (0, 0, 1, 2, 3, 4, 4, 0, 1, 1):
        assert ask(engine, prompts[i], GREEDY)[0] == expected[i]
        assert engine.load().free_kv_tokens == 22 * BLOCK_SIZE
    assert 0 < engine.stats.num_cached_tokens < 5 * 24  # 0, 4 and 1 again; the last 0 was evicted


def test_prefix_caching_off_never_hits(tiny_model_dir: Path, make_engine: EngineFactory) -> None:
    engine = make_engine(uncached(engine_config(tiny_model_dir)))
    usages = [ask(engine, TEXT[:100], GREEDY)[1] for _ in range(2)]
    assert [usage.cached_tokens for usage in usages] == [0, 0]
    assert engine.stats.prefix_hit_rate == 0.0


def cached_blocks(engine: Engine, tokens: list[int]) -> list[int]:
    """What a sequence that goes on after `tokens` would be given."""
    probe = Sequence(Request("probe", (0,)), 0, tokens + [0] * 32)
    return engine._scheduler._prefix_cache.match(probe)


def content(engine: Engine, block: int) -> torch.Tensor:
    """K and V of all layers, [2 * num_layers, num_kv_heads, block_size, head_dim]."""
    assert isinstance(engine._executor, LocalExecutor)
    cache = engine._executor._runner._pages
    slots = slice(block * cache.block_size, (block + 1) * cache.block_size)
    return torch.stack([layer[:, slots] for layer in (*cache.k, *cache.v)])


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_a_stop_within_an_accepted_draft_leaves_only_right_blocks(
    block_size: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """All drafts are accepted here, so the step computes K/V behind the stop."""
    config = engine_config(
        tiny_model_dir, draft_length=6, draft_budget=400, block_size=block_size, num_blocks=400
    )
    whole, _ = ask(make_engine(config), TEXT[:41], SAMPLED)
    for stop in range(6, 12):
        engine = make_engine(config)
        at_stop = replace(SAMPLED, stop_token_ids=(whole[stop],))
        answer, _ = ask(engine, TEXT[:41], at_stop)
        assert answer == whole[: whole.index(whole[stop]) + 1]
        tokens = TEXT[:41] + answer
        blocks = cached_blocks(engine, TEXT[:41] + whole)
        assert 41 // block_size <= len(blocks) <= len(tokens) // block_size
        fresh = make_engine(config)
        ask(fresh, tokens + [0] * 40, replace(GREEDY, max_tokens=1))
        for mine, right in zip(blocks, cached_blocks(fresh, tokens), strict=False):
            torch.testing.assert_close(content(engine, mine), content(fresh, right))


def filled(cache: PrefixCache, pool: BlockPool, tokens: list[int]) -> Sequence:
    """A running sequence, all of its tokens computed."""
    sequence = Sequence(Request("r", (0,)), 0, list(tokens))
    sequence.hold_blocks(pool.allocate(-(-len(tokens) // BLOCK_SIZE)))
    sequence.num_computed_tokens = len(tokens)
    return sequence


def test_a_chain_is_evicted_from_its_tail_whichever_sequence_ends_first() -> None:
    """Two fill the same prefix at once; the owner of its blocks ends long before the other."""
    pool = BlockPool(12)
    cache = PrefixCache(pool, BLOCK_SIZE, enabled=True)
    owner, other = (filled(cache, pool, TEXT[:n]) for n in (16, 32))
    for sequence in (owner, other):
        cache.register(sequence)
    assert pool.key_of(other.block_table[0]) is None
    cache.release(owner)
    cache.release(other)
    taken = pool.allocate(8)
    for num_left in (4, 3, 2, 1):
        assert len(cache.match(Sequence(Request("r", (0,)), 1, TEXT[:64]))) == num_left
        taken += pool.allocate(1)
        pool.check_integrity([taken])


def test_tokens_ahead_of_the_sequence_are_not_registered() -> None:
    """num_computed_tokens counts an accepted draft before its tokens are appended."""
    pool = BlockPool(8)
    cache = PrefixCache(pool, BLOCK_SIZE, enabled=True)
    sequence = filled(cache, pool, TEXT[:30])
    sequence.num_computed_tokens = 34
    cache.register(sequence)
    assert sequence.num_registered_blocks == 3
    assert [pool.key_of(b) is None for b in sequence.block_table] == [False, False, False, True]
