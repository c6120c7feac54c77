"""What is refused, over HTTP: status, field and code of each, and that nothing was queued."""

import json
from typing import Any

import httpx
import pytest

from tests.deployments.conftest import MODEL, AppFactory, ServedApp

IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
USER = {"role": "user", "content": "hi"}

# Changes to a good body -> status, param, code
BOTH: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": None}, 400, "model", "invalid_value"),
    ({"n": 2}, 400, "n", "unsupported_parameter"),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_tokens": 2.5}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 5000}, 400, None, "context_length_exceeded"),
    ({"temperature": "0.5"}, 400, "temperature", "invalid_value"),
    ({"temperature": -1}, 400, "temperature", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"top_p": 1.5}, 400, "top_p", None),
    ({"top_k": -2}, 400, "top_k", None),
    ({"min_p": 2}, 400, "min_p", None),
    ({"presence_penalty": 3}, 400, "presence_penalty", None),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", None),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", None),
    ({"min_tokens": 100}, 400, "min_tokens", None),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", None),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias[5]", None),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", None),
    ({"stop": ["a"] * 17}, 400, "stop", None),
    ({"stop": ""}, 400, "stop", None),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids", None),
    ({"stream": "yes"}, 400, "stream", "invalid_value"),
    ({"stream_options": {"what": 1}}, 400, "stream_options.what", "unknown_parameter"),
    ({"service_tier": "flex"}, 400, "service_tier", "unsupported_parameter"),
    ({"no_such_field": 1}, 400, "no_such_field", "unknown_parameter"),
    ({"speculation": "on"}, 400, "speculation", "invalid_value"),
    ({"speculation": {"gamma": 4}}, 400, "speculation.gamma", "unknown_parameter"),
    ({"speculation": {"draft_budget": "0.5"}}, 400, "speculation.draft_budget", "invalid_value"),
    ({"speculation": {"draft_budget": 129}}, 400, "speculation.draft_budget", None),
    ({"speculation": {"drafter": "draft_model"}}, 400, "speculation.drafter", None),
]
COMPLETION: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"prompt": None}, 400, "prompt", "invalid_value"),
    ({"prompt": []}, 400, "prompt", "invalid_value"),
    ({"prompt": ""}, 400, "prompt", None),
    ({"prompt": [[1, "a"]]}, 400, "prompt.0.1", "invalid_value"),
    ({"prompt": [5, 99999]}, 400, "prompt", None),
    ({"prompt": ["a"] * 65}, 400, "prompt", None),
    ({"prompt": "x" * 600}, 400, "prompt", "context_length_exceeded"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
    ({"logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
    ({"max_completion_tokens": 5}, 400, "max_completion_tokens", "unknown_parameter"),
]
CHAT: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages.0.content.0.type", None),
    ({"messages": [{**USER, "name": "me"}]}, 400, "messages.0.name", "unsupported_parameter"),
    ({"messages": [{**USER, "content": "x" * 600}]}, 400, "messages", "context_length_exceeded"),
    ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ({"tool_choice": "auto"}, 400, "tool_choice", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    (
        {"response_format": {"type": "json_object"}},
        400,
        "response_format",
        "unsupported_parameter",
    ),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "unsupported_parameter"),
    ({"store": True}, 400, "store", "unsupported_parameter"),
]
HARMLESS: dict[str, Any] = {
    "n": 1,
    "user": "someone",
    "metadata": {"run": "7"},
    "service_tier": "auto",
    "logit_bias": {},
    "stop": None,
    "stream_options": None,
    "seed": -5,
    "top_k": -1,
}


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    return run_app()


def refused(app: ServedApp, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = httpx.post(f"{app.url}/v1/{path}", json=body, timeout=60)
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return response.status_code, error


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("change", "status", "param", "code"), BOTH + COMPLETION)
def test_completion_refused(
    app: ServedApp,
    change: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    streams: bool,
) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "stream": streams, **change}
    got, error = refused(app, "completions", body)
    assert got == status
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code


@pytest.mark.parametrize(("change", "status", "param", "code"), BOTH + CHAT)
def test_chat_refused(
    app: ServedApp, change: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 4, **change}
    got, error = refused(app, "chat/completions", body)
    assert got == status
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("[]", "invalid_value"),
        ("{}", "missing_required_parameter"),
        ('{"model": "tiny"}', "missing_required_parameter"),
    ],
)
def test_malformed_bodies(app: ServedApp, raw: str, code: str) -> None:
    response = httpx.post(f"{app.url}/v1/completions", content=raw, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


def test_over_long_prompt_names_both_counts(app: ServedApp) -> None:
    _, error = refused(app, "completions", {"model": MODEL, "prompt": "x" * 600})
    assert "maximum context length is 512 tokens" in error["message"]
    assert "600 in the prompt" in error["message"]


def test_over_long_prompt_and_answer_names_both_counts(app: ServedApp) -> None:
    body = {"model": MODEL, "prompt": "x" * 500, "max_tokens": 20}
    _, error = refused(app, "completions", body)
    assert "520 tokens (500 in the prompt, 20 in the completion)" in error["message"]


def test_harmless_fields_are_accepted(app: ServedApp) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2, **HARMLESS}
    assert httpx.post(f"{app.url}/v1/completions", json=body, timeout=60).status_code == 200
    chat = {
        "model": MODEL,
        "messages": [USER],
        "max_completion_tokens": 2,
        **HARMLESS,
        "response_format": {"type": "text"},
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "store": False,
    }
    response = httpx.post(f"{app.url}/v1/chat/completions", json=chat, timeout=60)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/nothing", 404)],
)
def test_unknown_routes_have_the_same_shape(
    app: ServedApp, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, f"{app.url}{path}")
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_nothing_was_queued(app: ServedApp) -> None:
    load = app.replicas()[0].load
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.free_kv_tokens == load.total_kv_tokens
    assert json.loads(httpx.get(f"{app.url}/health").text)["status"] == "ok"
