"""A row's body as the server reads one, and whether it fits the model's context."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from magicdec.config import SpeculativeConfig
from magicdec.deployments.batch_row import CHAT_URL, BatchRow
from magicdec.deployments.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationBody,
)
from magicdec.draft_choice import check_speculation
from magicdec.types import Request, RequestError, SpeculationParams

if TYPE_CHECKING:  # imports transformers, which most rows do not need
    from magicdec.deployments.prompts import PromptBuilder

MAX_CHOICES = 64  # prompts in one completion row
SPECIAL_TOKENS = 8  # that a tokenizer adds to a prompt, at most
_MANY_ROLES = 256  # conversations of so many different shapes are remembered


def parse_body(row: BatchRow) -> GenerationBody:
    """Raises ValidationError, and RequestError for what a batch cannot do."""
    body: GenerationBody
    if row.url == CHAT_URL:
        body = ChatCompletionRequest.model_validate(row.body)
    else:
        body = CompletionRequest.model_validate(row.body)
    if body.streams:
        raise RequestError("stream must be false or absent in a batch", param="stream")
    return body


def requests_of(body: GenerationBody, builder: "PromptBuilder") -> list[Request]:
    """One engine request a choice. Raises RequestError."""
    if isinstance(body, ChatCompletionRequest):
        return builder.chat(body)
    assert isinstance(body, CompletionRequest)
    return builder.completion(body)


class BodyCheck:
    """What a body asks, against the limits of model and server, as cheaply as it can be known.

    A token is at least one byte of its text, so a prompt of few bytes fits whatever its tokens are;
    only where that does not decide is it tokenized. Templates that write more for some texts than
    for others are not bounded so: the engine has the last word.
    """

    def __init__(
        self,
        load_builder: Callable[[], "PromptBuilder"],
        *,
        max_model_len: int,
        speculation: SpeculativeConfig,
    ) -> None:
        self._load_builder = load_builder
        self._max_model_len = max_model_len
        self._speculation = speculation
        self._template_bytes: dict[tuple[str, ...], int] = {}
        self.num_tokenized = 0

    def check(self, body: GenerationBody) -> None:
        """Raises RequestError."""
        check_speculation(body.speculation or SpeculationParams(), self._speculation)
        most = self._most_tokens(body)
        asked = body.asked_max_tokens
        if asked is None:
            asked = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else 1
        body.sampling(asked)
        if most is not None and most + asked <= self._max_model_len:
            return
        self.num_tokenized += 1
        requests_of(body, self._builder)

    @cached_property
    def _builder(self) -> "PromptBuilder":
        return self._load_builder()

    def _most_tokens(self, body: GenerationBody) -> int | None:
        """Of the longest prompt; None: only tokens tell, as where the body holds token ids."""
        if body.logit_bias or body.stop_token_ids:
            return None
        if isinstance(body, CompletionRequest):
            prompts = body.prompts
            if len(prompts) > MAX_CHOICES or not all(isinstance(p, str) and p for p in prompts):
                return None
            return max(_num_bytes(p) for p in prompts if isinstance(p, str)) + SPECIAL_TOKENS
        assert isinstance(body, ChatCompletionRequest)
        messages = [message.for_template() for message in body.messages]
        roles = tuple(message["role"] for message in messages)
        texts = sum(_num_bytes(message["content"]) for message in messages)
        return texts + self._around(roles)

    def _around(self, roles: tuple[str, ...]) -> int:
        """Bytes that the template writes around the texts. Raises RequestError: it refuses these
        roles."""
        if roles not in self._template_bytes:
            if len(self._template_bytes) >= _MANY_ROLES:
                self._template_bytes.clear()
            text = self._builder.rendered([{"role": role, "content": "x"} for role in roles])
            self._template_bytes[roles] = _num_bytes(text)
        return self._template_bytes[roles]


def _num_bytes(text: str) -> int:
    return len(text.encode())
