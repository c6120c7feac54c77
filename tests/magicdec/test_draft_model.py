"""The draft model: all of its drafts stand when it is the target, and none can change a token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.config import ConfigError, DraftModelConfig, EngineConfig
from magicdec.drafters import draft_model
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.types import Request, SamplingParams, SpeculationParams
from tests.conftest import FAMILIES, EngineFactory, byte_tokenizer, engine_config, save_model
from tests.generation import Outputs, random_prompts, requests_of, run, run_short_answers, token_ids

PROMPTS = random_prompts([2, 9, 40, 65, 130])
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=21, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=2, max_tokens=19, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=0.5, logit_bias=((383, 4.0), (9, -100.0)), seed=6, max_tokens=24),
]
REQUESTS = requests_of(PROMPTS, SAMPLINGS)
WHOLE_CONTEXT = 300  # a window that no request here outgrows


def drafted_config(target: Path, draft: Path, window: int | None, **settings: Any) -> EngineConfig:
    return engine_config(
        target,
        drafter="draft_model",
        draft_model=DraftModelConfig(str(draft), window),
        **{"draft_length": 4, "num_blocks": 100, **settings},
    )


def tokens_of(outputs: Outputs) -> dict[str, list[int]]:
    return {name: token_ids(parts) for name, parts in outputs.items()}


def assert_accepted_whole(outputs: Outputs) -> None:
    for parts in outputs.values():
        usage = parts[-1].usage
        assert usage.num_draft_tokens == usage.num_accepted_tokens > 0


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> dict[str, list[int]]:
    config = engine_config(tiny_model_dir, num_blocks=100)
    path = config.model.path
    engine = Engine(config, LocalExecutor(config), load_tokenizer(path), read_model_facts(path))
    return tokens_of(run(engine, REQUESTS))


@pytest.mark.parametrize("window", [None, WHOLE_CONTEXT])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gemma3"])
def test_the_target_as_its_own_draft_is_accepted_whole(
    family: str,
    window: int | None,
    model_dirs: Callable[[str], Path],
    make_engine: EngineFactory,
) -> None:
    """Greedy and sampled, alone in its layers' own sliding windows."""
    path = model_dirs(family)
    assert_accepted_whole(run(make_engine(drafted_config(path, path, window)), REQUESTS))


@pytest.mark.parametrize("window", [None, WHOLE_CONTEXT])
def test_catching_up_in_many_forwards_is_the_same(
    window: int | None,
    tiny_model_dir: Path,
    make_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_model, "_MAX_ROWS", 7)
    config = drafted_config(tiny_model_dir, tiny_model_dir, window)
    assert_accepted_whole(run(make_engine(config), REQUESTS))


@pytest.mark.parametrize("window", [None, WHOLE_CONTEXT])
@pytest.mark.parametrize(
    "first", [SpeculationParams(), SpeculationParams(False), SpeculationParams(drafter="ngram")]
)
def test_a_shared_prefix_is_accepted_whole(
    first: SpeculationParams, window: int | None, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """Its draft K/V come with its blocks where the first request left some, and are computed
    where it drafted otherwise."""
    engine = make_engine(drafted_config(tiny_model_dir, tiny_model_dir, window))
    prefix = tuple(PROMPTS[4])
    sampling = SAMPLINGS[1]
    run(engine, [Request("first", (*prefix, 1), sampling, speculation=first)])
    later = [Request(f"later {i}", (*prefix, 2, i), sampling) for i in range(3)]
    outputs = run(engine, later)
    assert_accepted_whole(outputs)
    assert all(parts[-1].usage.cached_tokens > 64 for parts in outputs.values())


@pytest.mark.parametrize("window", [None, WHOLE_CONTEXT, 24])
def test_preemption_changes_no_token_and_loses_no_draft(
    window: int | None, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    samplings = [
        SamplingParams(temperature=t, seed=i, max_tokens=70, ignore_eos=True)
        for i, t in enumerate([0.0, 0.5, 1.0, 1.0, 0.0])
    ]
    requests = requests_of(random_prompts([9, 10, 11, 12, 13], seed=1), samplings)
    engine = make_engine(drafted_config(tiny_model_dir, tiny_model_dir, window, num_blocks=24))
    run_short_answers(engine, max_tokens=70)
    outputs = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert tokens_of(outputs) == tokens_of(
        run(make_engine(engine_config(tiny_model_dir, num_blocks=100)), requests)
    )
    if window != 24:
        assert_accepted_whole(outputs)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("draft_length", "block_size"), [(1, 8), (4, 1), (7, 64)])
def test_the_first_layers_as_a_draft_give_the_plain_tokens(
    draft_length: int,
    block_size: int,
    window: int | None,
    expected: dict[str, list[int]],
    tiny_model_dir: Path,
    first_layers: Path,
    make_engine: EngineFactory,
) -> None:
    config = drafted_config(
        tiny_model_dir,
        first_layers,
        window,
        draft_length=draft_length,
        block_size=block_size,
        num_blocks=1024 // block_size,
    )
    engine = make_engine(config)
    assert tokens_of(run(engine, REQUESTS)) == expected
    assert engine.stats.num_draft_tokens > engine.stats.num_accepted_tokens > 0


@pytest.fixture(scope="module")
def first_layers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target without its last layer."""
    folder = tmp_path_factory.mktemp("models") / "first_layers"
    module: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    module.model.layers = module.model.layers[:2]
    module.config.num_hidden_layers = 2
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [None, 24])
def test_requests_with_different_drafters_share_a_batch(
    window: int | None,
    expected: dict[str, list[int]],
    tiny_model_dir: Path,
    first_layers: Path,
    make_engine: EngineFactory,
) -> None:
    wishes = [
        SpeculationParams(drafter="draft_model", draft_length=16),
        SpeculationParams(drafter="ngram"),
        SpeculationParams(drafter="streaming", draft_length=2),
        SpeculationParams(drafter="draft_model", draft_length=1),
        SpeculationParams(enabled=False),
    ]
    engine = make_engine(drafted_config(tiny_model_dir, first_layers, window))
    requests = [replace(r, speculation=wish) for r, wish in zip(REQUESTS, wishes, strict=True)]
    assert tokens_of(run(engine, requests)) == expected


@pytest.mark.parametrize("vocab_size", [300, 500])
def test_logits_may_be_padded_to_another_width(
    vocab_size: int,
    expected: dict[str, list[int]],
    tiny_model_dir: Path,
    tmp_path: Path,
    make_engine: EngineFactory,
) -> None:
    """One prompt holds ids that the narrower model does not know; one request favours one."""
    draft = save_model(tmp_path / "padded", LlamaConfig(**_shape() | {"vocab_size": vocab_size}))
    requests = [*REQUESTS, Request("wide", (383, 1, 382), SAMPLINGS[0])]
    outputs = run(make_engine(drafted_config(tiny_model_dir, draft, None)), requests)
    assert len(outputs.pop("wide")) > 0
    assert tokens_of(outputs) == expected


def test_optimal_coupling_accepts_what_the_target_itself_drafts(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = drafted_config(tiny_model_dir, tiny_model_dir, None, verification="optimal_coupling")
    assert_accepted_whole(run(make_engine(config), REQUESTS))


def test_another_vocabulary_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    draft = save_model(tmp_path / "draft", FAMILIES["llama"]())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<first>", "<second>"])
    tokenizer.save_pretrained(draft)
    with pytest.raises(ConfigError, match="2 tokens differ, first '<first>'") as error:
        LocalExecutor(drafted_config(tiny_model_dir, draft, None))
    assert str(draft) in str(error.value) and str(tiny_model_dir) in str(error.value)


def test_a_shorter_context_is_refused_unless_no_more_is_served(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shape = _shape() | {"max_position_embeddings": 256}
    draft = save_model(tmp_path / "draft", LlamaConfig(**shape))
    config = drafted_config(tiny_model_dir, draft, None)
    with pytest.raises(ConfigError, match="256 positions, fewer than the 512"):
        LocalExecutor(config)
    LocalExecutor(replace(config, model=replace(config.model, max_model_len=256)))


def test_a_window_too_small_for_a_round_is_refused(tiny_model_dir: Path) -> None:
    """Sink 4, recent 2, and 16 tokens, the longest draft that a request may ask for."""
    with pytest.raises(ConfigError, match="draft_model_window must be at least 22, got 21"):
        drafted_config(tiny_model_dir, tiny_model_dir, 21)


def _shape() -> dict[str, Any]:
    return FAMILIES["llama"]().to_dict()
