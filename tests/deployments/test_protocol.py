"""Bodies and what their errors say, without a server."""

from typing import Any

import pytest
from pydantic import ValidationError

from magicdec.deployments.errors import from_validation_error
from magicdec.deployments.protocol import (
    MAX_LOGIT_BIASES,
    CompletionRequest,
    parse_logit_bias,
)
from magicdec.types import RequestError

SHAPES = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_prompts_of_every_shape(prompt: Any) -> None:
    body = CompletionRequest.model_validate({"model": "m", "prompt": prompt})
    alone = prompt if isinstance(prompt[0], list) or prompt == ["a", "b"] else [prompt]
    assert body.prompts == alone


@pytest.mark.parametrize(
    ("prompt", "param", "found"),
    [
        ("[1.0, 2]", "prompt.0", "a number that is no integer"),
        ("[1, 2.5]", "prompt.1", "a number that is no integer"),
        ("[true]", "prompt.0", "a boolean"),
        ("[1, true]", "prompt.1", "a boolean"),
        ('["a", 1]', "prompt.1", "an integer"),
        ('[[1], [2, "a"]]', "prompt.1.1", "a string"),
        ('[[1], "a"]', "prompt.1", "a string"),
        ("[null]", "prompt.0", "null"),
        ("{}", "prompt", "an object"),
        ("[]", "prompt", "an empty array"),
    ],
)
def test_a_wrong_prompt_names_its_shapes_and_the_element(
    prompt: str, param: str, found: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(f'{{"model": "m", "prompt": {prompt}}}')
    error = from_validation_error(caught.value)
    assert (error.status, error.param, error.code) == (400, param, "invalid_value")
    assert error.message == f"{param}: prompt must be {SHAPES}; this is {found}"


def test_logit_bias() -> None:
    assert parse_logit_bias(None) == ()
    assert parse_logit_bias({"5": 1.0, "07": -2.0}) == ((5, 1.0), (7, -2.0))
    assert len(parse_logit_bias({str(i): 1.0 for i in range(MAX_LOGIT_BIASES)})) == 300


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"9" * 5000: 1.0}, "must be token ids"),
        ({"12345678901": 1.0}, "must be token ids"),
        ({"-1": 1.0}, "must be token ids"),
        ({"5": 1.0, "05": 2.0}, "names token id 5 twice"),
        ({str(i): 1.0 for i in range(301)}, "at most 300 entries, got 301"),
    ],
)
def test_logit_bias_refused(bias: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_logit_bias(bias)
    assert message in caught.value.message
    assert len(caught.value.message) < 100
    assert caught.value.param == "logit_bias"
