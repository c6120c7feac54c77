"""`magicdec generate`: one prompt through the engine, in this process, without Ray."""

import time
from collections.abc import Iterator
from typing import Any

from magicdec.deployments.engine_builder import BuiltEngine, build_engine
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.protocol import ChatCompletionRequest, CompletionRequest
from magicdec.deployments.settings import ServeSettings
from magicdec.types import Request, RequestOutput


class Generation:
    """One answer. Iterate over `outputs`, then read `summary`."""

    def __init__(
        self, settings: ServeSettings, prompt: str, sampling: dict[str, Any], *, chat: bool
    ) -> None:
        """`sampling`: fields of the OpenAI body, such as max_tokens. Raises RequestError."""
        self._built = build_engine(settings.engine_config())
        self._request = _request(self._built, prompt, sampling, chat=chat)
        self._last: RequestOutput | None = None
        self._seconds = 0.0  # from the first output on: decoding, not prefill
        self._prefill_seconds = 0.0

    def outputs(self) -> Iterator[RequestOutput]:
        engine = self._built.engine
        started = time.perf_counter()
        engine.add(self._request)
        while engine.has_unfinished():
            for output in engine.step():
                if self._last is None:
                    self._prefill_seconds = time.perf_counter() - started
                self._last = output
                yield output
        self._seconds = time.perf_counter() - started - self._prefill_seconds
        engine.shutdown()

    def summary(self) -> str:
        """Counts and speed, one line."""
        if self._last is None:
            return "no output"
        usage = self._last.usage
        # The first token comes with the prefill.
        rate = (usage.completion_tokens - 1) / self._seconds if self._seconds else 0.0
        return (
            f"{usage.prompt_tokens} prompt tokens in {self._prefill_seconds:.1f} s, "
            f"{usage.completion_tokens} tokens at {rate:.1f} tokens/s, "
            f"{usage.num_rounds} rounds, mean acceptance length "
            f"{usage.mean_acceptance_length:.2f}, attention {self._built.engine.attention_backend}"
        )


def _request(built: BuiltEngine, prompt: str, sampling: dict[str, Any], *, chat: bool) -> Request:
    """Built as the server builds it, so that both answer alike."""
    builder = PromptBuilder(
        built.tokenizer,
        max_model_len=built.engine.max_model_len,
        vocab_size=built.vocab_size,
        max_choices=1,
        speculation=built.engine.config.speculation,
    )
    fields = {name: value for name, value in sampling.items() if value is not None}
    if chat:
        messages = [{"role": "user", "content": prompt}]
        body = ChatCompletionRequest.model_validate({"model": "", "messages": messages, **fields})
        return builder.chat(body)[0]
    return builder.completion(
        CompletionRequest.model_validate({"model": "", "prompt": prompt, **fields})
    )[0]
