"""Bodies to engine requests: chat template, tokenization, and every check that needs token counts.

Slow for long prompts, so the ingress calls it in a thread. Knows no engine and no Ray.
"""

from uuid import uuid4

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from magicdec.config import SpeculativeConfig
from magicdec.deployments.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationBody,
)
from magicdec.draft_choice import check_speculation
from magicdec.types import Request, RequestError, SpeculationParams

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


class PromptBuilder:
    """`max_model_len`: the longest context served, prompt and output, in tokens. `speculation`:
    what the server's replicas draft, and how much a request may ask of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int,
        vocab_size: int,
        max_choices: int,
        speculation: SpeculativeConfig,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_choices = max_choices
        self._speculation = speculation

    def completion(self, body: CompletionRequest) -> list[Request]:
        """One request a prompt. Raises RequestError."""
        prompts = body.prompts
        if len(prompts) > self._max_choices:
            message = f"at most {self._max_choices} prompts a request, got {len(prompts)}"
            raise RequestError(message, param="prompt")
        encoded = [self._encode(p) if isinstance(p, str) else tuple(p) for p in prompts]
        asked = body.asked_max_tokens
        return [
            self._request(body, "prompt", ids, asked, DEFAULT_COMPLETION_TOKENS) for ids in encoded
        ]

    def chat(self, body: ChatCompletionRequest) -> list[Request]:
        """One request. Raises RequestError."""
        messages = [message.for_template() for message in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise RequestError(message, param="messages") from error
        # The template writes the special tokens itself.
        ids = tuple(self._tokenizer(str(text), add_special_tokens=False)["input_ids"])
        return [self._request(body, "messages", ids, body.asked_max_tokens, self._max_model_len)]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text)["input_ids"])

    def _request(
        self,
        body: GenerationBody,
        param: str,
        token_ids: tuple[int, ...],
        asked: int | None,
        default: int,
    ) -> Request:
        speculation = body.speculation or SpeculationParams()
        check_speculation(speculation, self._speculation)
        self._check_ids(param, token_ids)
        self._check_ids("stop_token_ids", tuple(body.stop_token_ids or ()))
        room = self._max_model_len - len(token_ids)
        if room < 1:
            raise self._too_long(param, len(token_ids), asked or 1)
        sampling = body.sampling(min(default, room) if asked is None else asked)
        if sampling.max_tokens > room:
            raise self._too_long(param, len(token_ids), sampling.max_tokens)
        self._check_ids("logit_bias", tuple(token_id for token_id, _ in sampling.logit_bias))
        if param != "stop_token_ids" and not token_ids:
            raise RequestError(f"{param} must hold at least one token", param=param)
        return Request(f"req-{uuid4().hex}", token_ids, sampling, speculation=speculation)

    def _check_ids(self, param: str, token_ids: tuple[int, ...]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            wrong = next(t for t in token_ids if not 0 <= t < self._vocab_size)
            message = f"{param}: token id {wrong} is not in 0..{self._vocab_size - 1}"
            raise RequestError(message, param=param)

    def _too_long(self, param: str, num_prompt: int, num_output: int) -> RequestError:
        return RequestError(
            f"This model's maximum context length is {self._max_model_len} tokens. However, you "
            f"requested {num_prompt + num_output} tokens ({num_prompt} in the {param}, "
            f"{num_output} in the completion). Reduce one of them.",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
