"""A row's body as the server reads one, and whether it fits the model's context."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """`template_bytes`: of the chat template's own text; None where the model has none."""

    max_model_len: int  # tokens, prompt and output
    template_bytes: int | None


class BodyCheck:
    """What a body asks, against the limits of model and server, as cheaply as it can be known.

    A token is at least one byte of text, and a template writes its own text at most once a message
    and once around them. So a prompt of few bytes fits whatever its tokens are, and is tokenized
    only where that does not decide. The engine has the last word, as of roles that a template
    refuses.
    """

    def __init__(
        self,
        load_builder: Callable[[], "PromptBuilder"],
        limits: PromptLimits,
        speculation: SpeculativeConfig,
    ) -> None:
        self._load_builder = load_builder
        self._limits = limits
        self._speculation = speculation
        self.num_tokenized = 0

    def check(self, body: GenerationBody) -> None:
        """Raises RequestError."""
        check_speculation(body.speculation or SpeculationParams(), self._speculation)
        most = self._most_tokens(body)
        asked = body.asked_max_tokens
        if asked is None:
            asked = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else 1
        body.sampling(asked)
        if most is not None and most + asked <= self._limits.max_model_len:
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
        if self._limits.template_bytes is None:
            return None
        texts = [message.for_template()["content"] for message in body.messages]
        return sum(map(_num_bytes, texts)) + (len(texts) + 1) * self._limits.template_bytes


def _num_bytes(text: str) -> int:
    return len(text.encode())
