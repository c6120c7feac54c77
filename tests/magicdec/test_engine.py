"""Stops, limits, cancellation and refusals of the engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronConfig

from magicdec.attention import UnsupportedModel
from magicdec.config import CacheConfig, ConfigError, EngineConfig, ModelConfig
from magicdec.model_loader import describe_model
from magicdec.types import FinishReason, Request, RequestError, SamplingParams
from tests.conftest import VOCAB_SIZE, EngineFactory, engine_config
from tests.generation import random_prompts, run, text, token_ids

PROMPT = tuple(random_prompts([30])[0])
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def answer(
    engine_of: EngineFactory, config: EngineConfig, sampling: SamplingParams
) -> tuple[list[int], str, FinishReason | None]:
    outputs = run(engine_of(config), [Request("r", PROMPT, sampling)])["r"]
    return token_ids(outputs), text(outputs), outputs[-1].finish_reason


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_stop_id_ends_the_answer_with_that_token(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, draft_length=draft_length)
    whole, _, reason = answer(make_engine, config, GREEDY)
    assert (len(whole), reason) == (40, FinishReason.LENGTH)
    stop = whole[17]
    tokens, _, reason = answer(make_engine, config, replace(GREEDY, stop_token_ids=(stop,)))
    assert tokens == whole[: whole.index(stop) + 1]
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_stop_string_ends_the_text_before_it(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """The bias keeps to printable bytes, so that every token is one character."""
    letters = tuple((i, 60.0) for i in range(30, 60))
    config = engine_config(tiny_model_dir, draft_length=draft_length)
    sampling = SamplingParams(seed=1, max_tokens=40, logit_bias=letters)
    _, whole, _ = answer(make_engine, config, sampling)
    stop = whole[10:13]
    tokens, cut, reason = answer(make_engine, config, replace(sampling, stop=(stop,)))
    assert cut == whole[: whole.index(stop)]
    assert len(tokens) == len(cut) + len(stop)
    assert reason is FinishReason.STOP


def test_min_tokens_outlasts_a_stop_id(tiny_model_dir: Path, make_engine: EngineFactory) -> None:
    config = engine_config(tiny_model_dir, draft_length=2)
    first = answer(make_engine, config, GREEDY)[0][0]
    sampling = replace(GREEDY, stop_token_ids=(first,), min_tokens=6)
    tokens, _, _ = answer(make_engine, config, sampling)
    assert len(tokens) >= 6
    assert first not in tokens[:6]


@pytest.mark.parametrize("draft_length", [0, 4])
def test_the_end_of_the_context_ends_the_answer(
    draft_length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, draft_length=draft_length)
    config = replace(config, model=replace(config.model, max_model_len=47))
    tokens, _, reason = answer(make_engine, config, GREEDY)
    assert (len(tokens), reason) == (17, FinishReason.LENGTH)


def test_cancellation_frees_the_blocks_at_once(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=3, max_batch_tokens=40))
    for name in ("prefilling", "decoding", "waiting"):
        engine.add(Request(name, PROMPT, GREEDY))
    for _ in range(4):
        engine.step()
    for name in ("decoding", "waiting", "prefilling", "prefilling"):
        engine.abort(name)
        engine.check_integrity()
    assert engine.load().free_kv_tokens == engine.load().total_kv_tokens
    assert not engine.has_unfinished()
    assert engine.step() == []


def test_usage_counts_what_was_drafted_and_accepted(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(engine_config(tiny_model_dir, draft_length=3, draft_budget=30))
    usage = run(engine, [Request("r", PROMPT, GREEDY)])["r"][-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (30, 40)
    assert usage.completion_tokens == 1 + usage.num_rounds + usage.num_accepted_tokens
    assert usage.num_draft_tokens <= 3 * usage.num_rounds
    assert usage.mean_acceptance_length == 1 + usage.num_accepted_tokens / usage.num_rounds


@pytest.mark.parametrize(
    ("request_", "param", "code", "words"),
    [
        (Request("r", ()), "prompt", None, "at least one token"),
        (Request("r", (0,) * 512), "prompt", "context_length_exceeded", "512 tokens"),
        (Request("r", (VOCAB_SIZE,)), "prompt", None, f"token id {VOCAB_SIZE}"),
        (
            Request("r", (1,), SamplingParams(logit_bias=((9999, 1.0),))),
            "logit_bias",
            None,
            "token id 9999",
        ),
        (
            Request("r", (1,), SamplingParams(stop_token_ids=(-1,))),
            "stop_token_ids",
            None,
            "token id -1",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_queues_nothing(
    request_: Request,
    param: str,
    code: str | None,
    words: str,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
) -> None:
    engine = make_engine(engine_config(tiny_model_dir))
    with pytest.raises(RequestError, match=words) as caught:
        engine.add(request_)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-30),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("logit_bias", ((1, 101.0),)),
    ],
)
def test_a_parameter_out_of_range_names_itself(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param.startswith(field)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig("m", dtype="int8"), "dtype must be one of .* got 'int8'"),
        (lambda: CacheConfig(block_size=0), "block_size must be at least 1, got 0"),
        (lambda: engine_config(Path("m"), draft_length=17), "at most 16, got 17"),
        (lambda: engine_config(Path("m"), draft_budget=4), "draft_budget must be at least"),
        (lambda: engine_config(Path("m"), max_batch_tokens=7), "max_batch_tokens must be at"),
    ],
)
def test_a_setting_out_of_range_names_itself(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_context_beyond_the_models_is_refused(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir)
    with pytest.raises(ConfigError, match="at most the model's 512, got 513"):
        make_engine(replace(config, model=replace(config.model, max_model_len=513)))


def test_a_pool_smaller_than_the_context_bounds_it(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, num_blocks=5)
    assert make_engine(config).max_model_len == 40
    with pytest.raises(ConfigError, match="KV pool of 40 tokens, got 41"):
        make_engine(replace(config, model=replace(config.model, max_model_len=41)))


def test_a_pool_without_a_block_is_refused(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir)
    with pytest.raises(ConfigError, match=r"kv_cache_bytes .* must be at least 6144, got 1000"):
        make_engine(replace(config, cache=CacheConfig(block_size=8, kv_cache_bytes=1000)))


def test_the_first_token_belongs_to_no_round(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """A prompt of one row, and one whose last chunk is one row."""
    engine = make_engine(engine_config(tiny_model_dir, max_batch_tokens=40, draft_length=2))
    one = SamplingParams(temperature=0.0, max_tokens=1)
    outputs = run(engine, [Request("a", PROMPT[:1], one), Request("b", PROMPT, one)])
    assert [outputs[name][-1].usage.num_rounds for name in "ab"] == [0, 0]
    assert engine.stats.num_prefill_tokens == 31


def test_a_full_batch_of_drafts_still_admits_a_newcomer(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(tiny_model_dir, draft_length=4, max_batch_tokens=36, max_num_seqs=4)
    engine = make_engine(config)
    long = replace(GREEDY, max_tokens=400)
    for i in range(3):
        engine.add(Request(str(i), PROMPT[:5], long))
    while engine.load().num_waiting:
        engine.step()
    engine.add(Request("newcomer", PROMPT, replace(GREEDY, max_tokens=1)))
    finished = [o.request_id for _ in range(20) for o in engine.step() if o.finish_reason]
    assert finished == ["newcomer"]
    for i in range(3):
        engine.abort(str(i))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
    ],
)
def test_attention_that_depends_on_neighbours_or_on_an_unbuilt_mask_is_refused(
    changes: dict[str, object], words: str, tiny_model_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    vars(model.config).update(changes)
    with pytest.raises(UnsupportedModel, match=words):
        describe_model(model, "float32")


class OwnAttention(torch.nn.Module):
    """A layer that computes its attention without asking AttentionInterface."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states, None


@pytest.mark.parametrize(("layer", "words"), [(0, "layer 1 ran as number 0"), (2, "2 of 3")])
def test_a_model_with_its_own_attention_is_refused(
    layer: int, words: str, tiny_model_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model.layers[layer].self_attn = OwnAttention()
    with pytest.raises(UnsupportedModel, match=words):
        describe_model(model, "float32")


def test_a_model_that_keeps_the_context_from_its_attention_is_refused() -> None:
    config = NemotronConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match="NemotronAttention is not given"):
        describe_model(model, "float32")
