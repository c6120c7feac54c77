"""Settings: one source of defaults, errors that name field, value and limit."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from magicdec.config import (
    CacheConfig,
    DraftModelConfig,
    EngineConfig,
    ModelConfig,
    SelectionConfig,
    SpeculativeConfig,
)
from magicdec.deployments.app import build
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.engine_settings import SpeculationSettings
from magicdec.deployments.settings import (
    ServeSettings,
    SettingsError,
    load_settings,
    parse_settings,
)


def test_defaults_are_the_engine_s_own() -> None:
    assert ServeSettings().engine_config() == EngineConfig(ModelConfig(EMBEDDED_MODEL_NAME))


def test_every_field_of_the_draft_reaches_the_engine() -> None:
    speculation = {
        "drafter": "draft_model",
        "draft_length": 5,
        "draft_budget": 700,
        "max_draft_length": 7,
        "max_draft_budget": 900,
        "max_view_share": 0.5,
        "verification": "optimal_coupling",
        "num_sink_tokens": 8,
        "num_recent_tokens": 32,
        "num_first_layers": 2,
        "first_layers_factor": 1.5,
        "refresh_rounds": 3,
        "chunk_size": 16,
        "coverage": 0.9,
        "draft_model": "org/small",
        "draft_model_window": None,
    }
    assert speculation.keys() == SpeculationSettings.model_fields.keys()
    config = parse_settings({"speculation": speculation}).engine_config().speculation
    assert config == SpeculativeConfig(
        drafter="draft_model",
        draft_length=5,
        draft_budget=700,
        max_draft_length=7,
        max_draft_budget=900,
        max_view_share=0.5,
        verification="optimal_coupling",
        selection=SelectionConfig(8, 32, 2, 1.5, 3, 16, 0.9),
        draft_model=DraftModelConfig("org/small", None),
    )


def test_the_prefix_cache_can_be_switched_off() -> None:
    settings = parse_settings({"cache": {"prefix_caching": False}})
    assert settings.engine_config().cache == CacheConfig(prefix_caching=False)


@pytest.mark.parametrize(("given", "budget"), [(200, 200), (200.0, 200), ("0.25", 0.25)])
def test_a_budget_is_whole_or_a_share(given: object, budget: float) -> None:
    settings = parse_settings({"speculation": {"draft_budget": given}})
    parsed = settings.engine_config().speculation.draft_budget
    assert (parsed, type(parsed)) == (budget, type(budget))


def test_models_to_load_are_the_model_and_its_draft() -> None:
    assert ServeSettings().model_paths == [EMBEDDED_MODEL_NAME]
    with_draft = parse_settings({"model": {"path": "a"}, "speculation": {"draft_model": "b"}})
    assert with_draft.model_paths == ["a", "b"]


def test_every_field_is_described() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(ServeSettings)


def test_served_name_is_the_last_part_of_the_path() -> None:
    assert parse_settings({"model": {"path": "/models/llama/"}}).model.name == "llama"
    assert parse_settings({"model": {"path": "org/llama"}}).model.name == "llama"
    given = {"model": {"path": "org/llama", "served_name": "x"}}
    assert parse_settings(given).model.name == "x"


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("model: {path: a, dtype: float32}\nserver: {port: 9000}\ncache:\n")
    overrides: dict[str, dict[str, Any]] = {"model": {"path": "b"}, "cache": {"kv_cache_gib": 0.5}}
    settings = load_settings(str(path), overrides)
    assert (settings.model.path, settings.model.dtype) == ("b", "float32")
    assert settings.server.port == 9000
    assert settings.engine_config().cache.kv_cache_bytes == 1 << 29


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"server": {"port": 70000}}, "server.port: Input should be less than or equal to 65535"),
        ({"server": {"prot": 1}}, "server.prot: Extra inputs are not permitted (got 1)"),
        ({"speculation": {"draft_length": 40}}, "draft_length must be at most 16, got 40"),
        ({"speculation": {"draft_length": -1}}, "draft_length must be at least 0, got -1"),
        ({"speculation": {"draft_budget": 83}}, "draft_budget must be at least 84, got 83"),
        ({"speculation": {"draft_budget": 90.5}}, "a share of the context below 1, got 90.5"),
        ({"speculation": {"draft_budget": -3}}, "Input should be greater than 0 (got -3)"),
        ({"speculation": {"draft_budget": float("nan")}}, "draft_budget: Input should be a finite"),
        ({"speculation": {"max_draft_budget": 100}}, "draft_budget must be at most 100, got 512"),
        ({"speculation": {"max_draft_length": 17}}, "max_draft_length must be at most 16, got 17"),
        ({"speculation": {"drafter": "medusa"}}, "draft_model, ngram, got 'medusa'"),
        ({"speculation": {"drafter": "draft_model"}}, "needs the path of a draft model"),
        ({"speculation": {"verification": "exact"}}, "optimal_coupling, got 'exact'"),
        ({"speculation": {"coverage": 0}}, "coverage must be above 0 and at most 1, got 0"),
        ({"cache": {"kv_cache_gib": float("inf")}}, "kv_cache_gib: Input should be a finite"),
        ({"model": {"dtype": "int4"}}, "got 'int4'"),
        ({"model": "llama"}, "model: "),
        ({"cache": {"kv_cache_gib": 0}}, "cache.kv_cache_gib: Input should be greater than 0"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- a", "must hold sections")]
)
def test_broken_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(str(path), {})
    assert "\n" not in str(caught.value)


def test_settings_survive_yaml() -> None:
    dumped = yaml.safe_dump(ServeSettings().model_dump())
    assert parse_settings(yaml.safe_load(dumped)) == ServeSettings()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_application_builds_without_a_cluster(ranks: int) -> None:
    build(parse_settings({"parallel": {"tensor_parallel_size": ranks}}))
