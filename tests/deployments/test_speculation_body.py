"""The body's `speculation`: what it becomes, and that every mistake is one line with its field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from magicdec.config import DraftModelConfig, SpeculativeConfig
from magicdec.deployments.errors import ApiError, from_request_error, from_validation_error
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.protocol import ChatCompletionRequest, CompletionRequest
from magicdec.types import Request, RequestError, SpeculationParams
from tests.conftest import byte_tokenizer

SERVER = SpeculativeConfig(max_draft_length=8, max_draft_budget=1024)
WITH_DRAFT_MODEL = SpeculativeConfig(draft_model=DraftModelConfig("some/model"))
SHAPE = 'must be "off" or an object with drafter, draft_length and draft_budget'
NUMBER = "must be a number of KV positions or a share below 1"


def builder(server: SpeculativeConfig = SERVER) -> PromptBuilder:
    return PromptBuilder(
        byte_tokenizer(), max_model_len=64, vocab_size=384, max_choices=4, speculation=server
    )


BUILDER = builder()


def ask(speculation: str, prompts: PromptBuilder = BUILDER) -> Request:
    """The engine's request for a body with this JSON. Raises ValidationError or RequestError."""
    raw = f'{{"model": "m", "prompt": [1, 2], "speculation": {speculation}}}'
    return prompts.completion(CompletionRequest.model_validate_json(raw))[0]


def refusal(speculation: str) -> ApiError:
    with pytest.raises((ValidationError, RequestError)) as caught:
        ask(speculation)
    return translated(caught.value)


def translated(error: ValueError) -> ApiError:
    if isinstance(error, RequestError):
        return from_request_error(error)
    assert isinstance(error, ValidationError)
    return from_validation_error(error)


@pytest.mark.parametrize(
    ("speculation", "params"),
    [
        ("null", SpeculationParams()),
        ("{}", SpeculationParams()),
        ('"off"', SpeculationParams(enabled=False)),
        ('{"drafter": null, "draft_length": null, "draft_budget": null}', SpeculationParams()),
        ('{"drafter": "auto"}', SpeculationParams(drafter="auto")),
        (
            '{"drafter": "snapkv", "draft_length": 8, "draft_budget": 1024}',
            SpeculationParams(drafter="snapkv", draft_length=8, draft_budget=1024),
        ),
        ('{"draft_length": 0}', SpeculationParams(draft_length=0)),
        # 16 sink and 64 recent positions are all that a draft of no tokens needs.
        (
            '{"draft_length": 0, "draft_budget": 80}',
            SpeculationParams(draft_length=0, draft_budget=80),
        ),
        ('{"draft_budget": 200.0}', SpeculationParams(draft_budget=200)),
        ('{"draft_budget": 0.25}', SpeculationParams(draft_budget=0.25)),
    ],
)
def test_what_a_request_may_ask(speculation: str, params: SpeculationParams) -> None:
    assert ask(speculation).speculation == params


def test_without_the_field_the_server_decides() -> None:
    (request,) = BUILDER.completion(
        CompletionRequest.model_validate_json('{"model": "m", "prompt": "a"}')
    )
    assert request.speculation == SpeculationParams()


def test_every_prompt_of_a_completion_and_a_chat_carry_it() -> None:
    fields = {"model": "m", "speculation": {"draft_length": 2}}
    completion = CompletionRequest.model_validate({**fields, "prompt": ["a", "b"]})
    messages = [{"role": "user", "content": "a"}]
    chat = ChatCompletionRequest.model_validate({**fields, "messages": messages})
    requests = [*BUILDER.completion(completion), *BUILDER.chat(chat)]
    assert [r.speculation.draft_length for r in requests] == [2, 2, 2]


def test_a_draft_model_may_be_asked_for_where_there_is_one() -> None:
    request = ask('{"drafter": "draft_model"}', builder(WITH_DRAFT_MODEL))
    assert request.speculation.drafter == "draft_model"


@pytest.mark.parametrize(
    ("speculation", "field", "message"),
    [
        ('"on"', "", f'{SHAPE}, got "on"'),
        ('"OFF"', "", f'{SHAPE}, got "OFF"'),
        ("true", "", f"{SHAPE}, got true"),
        ("false", "", f"{SHAPE}, got false"),
        ("0", "", f"{SHAPE}, got 0"),
        ("NaN", "", f"{SHAPE}, got NaN"),
        ("[]", "", f"{SHAPE}, got an array"),
        ('{"drafter": 1}', "drafter", "must be a string, got 1"),
        ('{"drafter": ["snapkv"]}', "drafter", "must be a string, got an array"),
        ('{"draft_length": true}', "draft_length", "must be an integer of 64 bits, got true"),
        ('{"draft_length": "4"}', "draft_length", 'must be an integer of 64 bits, got "4"'),
        ('{"draft_length": 2.0}', "draft_length", "must be an integer of 64 bits, got 2.0"),
        ('{"draft_length": {}}', "draft_length", "must be an integer of 64 bits, got an object"),
        ('{"draft_budget": "0.5"}', "draft_budget", f'{NUMBER}, got "0.5"'),
        ('{"draft_budget": true}', "draft_budget", f"{NUMBER}, got true"),
        ('{"draft_budget": NaN}', "draft_budget", f"{NUMBER}, got NaN"),
        ('{"draft_budget": 1e999}', "draft_budget", f"{NUMBER}, got Infinity"),
        ('{"draft_budget": 1' + 50 * "0" + "}", "draft_budget", f"{NUMBER}, got 1{39 * '0'}..."),
    ],
)
def test_a_wrong_shape_is_named_once(speculation: str, field: str, message: str) -> None:
    error = refusal(speculation)
    param = f"speculation.{field}".rstrip(".")
    assert (error.status, error.param, error.code) == (400, param, "invalid_value")
    assert error.message == f"{param}: {message}"


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    error = refusal('{"budget": 64}')
    assert (error.status, error.param) == (400, "speculation.budget")
    assert error.code == "unknown_parameter"
    known = "speculation takes drafter, draft_length and draft_budget"
    assert error.message == f'speculation.budget: {known}, got the field "budget"'


@pytest.mark.parametrize(
    ("speculation", "field", "limit"),
    [
        (
            '{"drafter": "medusa"}',
            "drafter",
            "must be one of auto, streaming, snapkv, recycled, draft_model, ngram, got 'medusa'",
        ),
        ('{"drafter": "off"}', "drafter", "must be one of auto,"),
        ('{"drafter": "top_k"}', "drafter", "must be one of auto,"),
        ('{"drafter": "draft_model"}', "drafter", "this server has no draft model"),
        ('{"draft_length": 9}', "draft_length", "must be between 0 and 8, got 9"),
        ('{"draft_length": -1}', "draft_length", "must be between 0 and 8, got -1"),
        ('{"draft_budget": 1025}', "draft_budget", "at most 1024, got 1025"),
        ('{"draft_budget": 1e300}', "draft_budget", "at most 1024, got 1e+300"),
        ('{"draft_budget": -64}', "draft_budget", "must be above 0 and at most 1024, got -64"),
        ('{"draft_budget": 0}', "draft_budget", "must be above 0 and at most 1024, got 0"),
        ('{"draft_budget": -0.5}', "draft_budget", "must be above 0 and at most 1024, got -0.5"),
        ('{"draft_budget": 100.5}', "draft_budget", "must be whole, or a share of the context"),
        ('{"draft_budget": 83}', "draft_budget", "must be at least 84 (sink, recent positions"),
        ('{"draft_budget": 1.0}', "draft_budget", "must be at least 84"),
        ('{"draft_length": 8, "draft_budget": 87}', "draft_budget", "must be at least 88"),
    ],
)
def test_a_limit_of_the_server_is_named(speculation: str, field: str, limit: str) -> None:
    error = refusal(speculation)
    assert (error.status, error.param) == (400, f"speculation.{field}")
    assert error.message.startswith(f"speculation.{field} ") and limit in error.message


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("off")
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)
NAMES = st.sampled_from(["drafter", "draft_length", "draft_budget"]) | st.text()
BODIES = VALUES | st.dictionaries(NAMES, SCALARS | st.sampled_from(["auto", "ngram"]), max_size=4)


@given(BODIES)
def test_any_json_is_served_or_refused_in_one_line(speculation: Any) -> None:
    try:
        request = ask(json.dumps(speculation))
    except (ValidationError, RequestError) as caught:
        error = translated(caught)
        assert error.status == 400
        assert error.param is not None and error.param.startswith("speculation")
        assert "\n" not in error.message and len(error.message) < 700
    else:
        asked = request.speculation
        assert asked.draft_length is None or 0 <= asked.draft_length <= SERVER.max_draft_length
        assert asked.draft_budget is None or 0 < asked.draft_budget <= SERVER.max_draft_budget
