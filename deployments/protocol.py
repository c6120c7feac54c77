"""OpenAI's request bodies: what is served, what is refused, and how it becomes SamplingParams.

A field is either served, accepted because ignoring it is harmless (`user`, `metadata`, ...), or
refused with 400 and its name; nothing that changes an answer is ignored. Our extensions are the
field's usual ones: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
return_token_ids; and our own `speculation`.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from magicdec.deployments.prompt_shape import Prompt, check_prompt
from magicdec.deployments.speculation_shape import check_speculation_shape
from magicdec.types import (
    MAX_SEED,
    RequestError,
    SamplingParams,
    SpeculationParams,
    check_range,
)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_LOGIT_BIASES = 300
MAX_TOKEN_ID_DIGITS = 10  # more than any vocabulary needs


def _refuse_unless(*allowed: object) -> BeforeValidator:
    """A field that is not served: only the values that ask for nothing pass."""

    def check(value: object) -> object:
        if value is None or value in allowed:
            return value
        raise PydanticCustomError("not_served", "this field is not served yet by this server")

    return BeforeValidator(check)


# `type(x) is` semantics do not matter here: 1 == True only lets `n: true` through as 1.
NotServed = Annotated[Any, _refuse_unless()]
OnlyFalse = Annotated[Any, _refuse_unless(False)]
OnlyOne = Annotated[Any, _refuse_unless(1)]
OnlyText = Annotated[Any, _refuse_unless({"type": "text"})]
OnlyTextModality = Annotated[Any, _refuse_unless(["text"])]
NoTools = Annotated[Any, _refuse_unless([])]
NoToolChoice = Annotated[Any, _refuse_unless("none")]
Speculation = Annotated[SpeculationParams | None, PlainValidator(check_speculation_shape)]
AnyTier = Annotated[Any, _refuse_unless("auto", "default")]


class Body(BaseModel):
    """Strict JSON types: "0.5" is not a number here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: OnlyFalse = None


class GenerationBody(Body):
    """What both endpoints share."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    speculation: Speculation = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: AnyTier = None

    n: OnlyOne = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Raises RequestError for a value out of range.

        Without a seed one is drawn here, so that a stream can be continued on another replica.
        """
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self._top_k(),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if self.seed is None else parse_seed(self.seed),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=parse_logit_bias(self.logit_bias),
            **{name: value for name, value in given.items() if value is not None},
        )

    def _top_k(self) -> int | None:
        return 0 if self.top_k == -1 else self.top_k  # -1 is vLLM's way to say off


class CompletionRequest(GenerationBody):
    prompt: Annotated[Prompt, PlainValidator(check_prompt)]

    best_of: OnlyOne = None
    echo: OnlyFalse = None
    logprobs: NotServed = None
    suffix: NotServed = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if isinstance(p, str)] or [
            p for p in self.prompt if isinstance(p, list)
        ]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: NotServed = None
    tool_calls: NoTools = None
    function_call: NotServed = None
    refusal: NotServed = None
    audio: NotServed = None

    def for_template(self) -> dict[str, str]:
        """Chat templates know `system`; OpenAI renamed it `developer`."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatCompletionRequest(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    store: OnlyFalse = None

    logprobs: OnlyFalse = None
    top_logprobs: NotServed = None
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    parallel_tool_calls: NotServed = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    response_format: OnlyText = None
    modalities: OnlyTextModality = None
    audio: NotServed = None
    prediction: NotServed = None
    reasoning_effort: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None

    @property
    def asked_max_tokens(self) -> int | None:
        """`max_completion_tokens` replaced `max_tokens`; it wins where both are given."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens


def parse_seed(seed: int) -> int:
    """Signed 64-bit seeds, as OpenAI takes them, are read as unsigned. Raises RequestError."""
    check_range("seed", seed, -(2**63), MAX_SEED)
    return seed & MAX_SEED


def parse_logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """{"token id": bias}, as JSON writes integer keys. Raises RequestError."""
    bias = bias or {}
    if len(bias) > MAX_LOGIT_BIASES:
        message = f"logit_bias takes at most {MAX_LOGIT_BIASES} entries, got {len(bias)}"
        raise RequestError(message, param="logit_bias")
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isdecimal() or len(key) > MAX_TOKEN_ID_DIGITS:
            message = f"logit_bias keys must be token ids, got {key[:20]!r}"
            raise RequestError(message, param="logit_bias")
        token_id = int(key)
        if token_id in pairs:  # "5" and "05"
            message = f"logit_bias names token id {token_id} twice"
            raise RequestError(message, param="logit_bias")
        pairs[token_id] = value
    return tuple(pairs.items())
