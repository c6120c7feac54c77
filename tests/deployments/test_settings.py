"""Settings: one source of defaults, errors that name field, value and limit."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from magicdec.config import (
    AdaptiveConfig,
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
from magicdec.routing.settings import AdmissionConfig


def test_defaults_are_the_engine_s_own() -> None:
    """But for the draft: a server chooses it, an engine does as it is told."""
    speculation = SpeculativeConfig(adaptive=AdaptiveConfig())
    assert ServeSettings().engine_config() == EngineConfig(
        ModelConfig(EMBEDDED_MODEL_NAME), speculation=speculation
    )


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
    adaptive = {
        "drafters": ["snapkv", "ngram"],
        "draft_budgets": [300, 900],
        "exploration_share": 0.02,
        "inter_token_target_s": 0.3,
    }
    assert speculation.keys() | adaptive.keys() == SpeculationSettings.model_fields.keys()
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, AdaptiveConfig(("recycled", "ngram"), (256, 512, 1024))),
        (
            {"drafters": ["snapkv"], "draft_budgets": [300, 900], "exploration_share": 0.02},
            AdaptiveConfig(("snapkv",), (300, 900), 0.02),
        ),
        ({"inter_token_target_s": 0.3}, AdaptiveConfig(inter_token_target_s=0.3)),
        ({"drafter": "streaming"}, AdaptiveConfig(("streaming",))),
        ({"draft_budget": 700}, AdaptiveConfig(draft_budgets=(700,))),
        ({"max_draft_budget": 600}, AdaptiveConfig(draft_budgets=(256, 512))),
        ({"max_draft_budget": 200}, AdaptiveConfig(draft_budgets=(200,))),
        ({"draft_model": "org/small"}, AdaptiveConfig(("recycled", "ngram", "draft_model"))),
        ({"draft_length": 0}, None),
        ({"draft_length": 4}, None),
    ],
)
def test_what_is_left_empty_is_chosen_by_rounds(
    given: dict[str, Any], expected: AdaptiveConfig | None
) -> None:
    speculation = parse_settings({"speculation": given}).engine_config().speculation
    assert speculation.adaptive == expected


def test_every_field_of_the_policy_reaches_the_router() -> None:
    server = {
        "max_queued_requests": 7,
        "company_wait_s": 0.5,
        "age_bound_s": 4.0,
        "length_classes": False,
        "prefix_affinity": False,
        "overload_factor": 2.5,
    }
    assert parse_settings({"server": server}).admission_config() == AdmissionConfig(
        max_queued_requests=7,
        company_wait_s=0.5,
        age_bound_s=4.0,
        length_classes=False,
        prefix_affinity=False,
        overload_factor=2.5,
    )
    assert ServeSettings().admission_config() == AdmissionConfig()


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


def test_an_empty_pool_is_left_to_the_ranks() -> None:
    cache = parse_settings({"cache": {"memory_share": 0.7}}).engine_config().cache
    assert (cache.kv_cache_bytes, cache.num_blocks, cache.memory_share) == (None, None, 0.7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"server": {"port": 70000}}, "server.port: Input should be less than or equal to 65535"),
        ({"server": {"prot": 1}}, "server.prot: Extra inputs are not permitted (got 1)"),
        ({"speculation": {"drafters": ["medusa"]}}, "drafters must be of streaming, snapkv,"),
        ({"speculation": {"drafters": []}}, "once each, got ()"),
        (
            {"speculation": {"draft_budgets": [512, 256]}},
            "draft_budgets must be above 0 and ascend",
        ),
        (
            {"speculation": {"draft_budgets": [50, 512]}},
            "draft_budgets must be at least 96, got 50",
        ),
        (
            {"speculation": {"draft_budgets": [9000]}},
            "draft_budgets must be at most 4096, got 9000",
        ),
        ({"speculation": {"drafters": ["draft_model"]}}, "needs the path of a draft model"),
        ({"speculation": {"exploration_share": 2}}, "exploration_share must be at most 1, got 2"),
        ({"speculation": {"inter_token_target_s": 0}}, "inter_token_target_s must be above 0"),
        (
            {"speculation": {"drafters": ["ngram"], "draft_length": 4}},
            "drafters is what rounds choose among: draft_length must be empty, got 4",
        ),
        ({"speculation": {"draft_length": 40}}, "draft_length must be at most 16, got 40"),
        ({"speculation": {"draft_length": -1}}, "draft_length must be at least 0, got -1"),
        ({"speculation": {"draft_budget": 83}}, "draft_budget must be at least 84, got 83"),
        ({"speculation": {"draft_budget": 90.5}}, "a share of the context below 1, got 90.5"),
        ({"speculation": {"draft_budget": -3}}, "Input should be greater than 0 (got -3)"),
        ({"speculation": {"draft_budget": float("nan")}}, "draft_budget: Input should be a finite"),
        ({"speculation": {"max_draft_budget": 50}}, "draft_budget must be at least 84, got 50"),
        ({"speculation": {"max_draft_length": 17}}, "max_draft_length must be at most 16, got 17"),
        ({"speculation": {"drafter": "medusa"}}, "draft_model, ngram, got 'medusa'"),
        ({"speculation": {"drafter": "draft_model"}}, "needs the path of a draft model"),
        ({"speculation": {"verification": "exact"}}, "optimal_coupling, got 'exact'"),
        ({"speculation": {"coverage": 0}}, "coverage must be above 0 and at most 1, got 0"),
        ({"cache": {"kv_cache_gib": float("inf")}}, "kv_cache_gib: Input should be a finite"),
        ({"server": {"overload_factor": 0.5}}, "overload_factor must be at least 1, got 0.5"),
        ({"server": {"age_bound_s": 0}}, "age_bound_s must be at least 0.02, got 0"),
        ({"model": {"dtype": "int4"}}, "got 'int4'"),
        ({"model": "llama"}, "model: "),
        ({"cache": {"kv_cache_gib": 0}}, "cache.kv_cache_gib: Input should be greater than 0"),
        ({"cache": {"memory_share": 0}}, "cache.memory_share: Input should be greater than 0"),
        ({"cache": {"memory_share": 1.5}}, "memory_share: Input should be less than or equal to 1"),
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
