"""OpenAI's response bodies, whole and in chunks, as plain dicts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from magicdec.types import RequestOutput, Usage


@dataclass(slots=True)
class ChoiceText:
    """What one choice has said so far, for an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: RequestOutput) -> None:
        self.text.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.finish_reason = _finish_reason(output)


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Builds the bodies of one response. `chat` chooses between the two endpoints' shapes."""

    chat: bool
    model: str
    with_token_ids: bool
    response_id: str
    created: int  # unix seconds

    @classmethod
    def new(cls, *, chat: bool, model: str, with_token_ids: bool) -> "ResponseFormat":
        prefix = "chatcmpl" if chat else "cmpl"
        response_id = f"{prefix}-{uuid4().hex}"
        return cls(chat, model, with_token_ids, response_id, int(time.time()))

    def whole(self, choices: Sequence[ChoiceText], usages: Sequence[Usage]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        built = [self._whole_choice(i, choice) for i, choice in enumerate(choices)]
        return {**self._head(kind), "choices": built, "usage": usage_body(usages)}

    def chunk(self, index: int, output: RequestOutput, *, first: bool) -> dict[str, Any]:
        """One verify round of one choice; its first chunk also names the role."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": output.text}
        else:
            choice["text"] = output.text
        choice["logprobs"] = None
        choice["finish_reason"] = _finish_reason(output)
        if self.with_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return {**self._head(kind), "choices": [choice]}

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage_body(usages)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _whole_choice(self, index: int, choice: ChoiceText) -> dict[str, Any]:
        text = "".join(choice.text)
        body: dict[str, Any] = {"index": index}
        if self.chat:
            body["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            body["text"] = text
        body["logprobs"] = None
        body["finish_reason"] = choice.finish_reason
        if self.with_token_ids:
            body["token_ids"] = choice.token_ids
        return body


def _finish_reason(output: RequestOutput) -> str | None:
    return None if output.finish_reason is None else output.finish_reason.value


def usage_body(usages: Sequence[Usage]) -> dict[str, Any]:
    """Counts summed over the choices; the mean acceptance length includes the bonus token.

    `drafter` is null where nothing was drafted; choices that differ are joined by a comma.
    """
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    total = add_usages(usages)
    drafters = sorted({u.drafter for u in usages if u.drafter is not None})
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
        "magicdec": {
            "drafter": ",".join(drafters) or None,
            "rounds": total.num_rounds,
            "drafted": total.num_draft_tokens,
            "accepted": total.num_accepted_tokens,
            "mean_acceptance_length": round(total.mean_acceptance_length, 4),
        },
    }


def add_usages(usages: Sequence[Usage]) -> Usage:
    """The sum of the counts; of the drafters the first, so the latest usage comes first."""
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in usages),
        completion_tokens=sum(u.completion_tokens for u in usages),
        cached_tokens=sum(u.cached_tokens for u in usages),
        num_rounds=sum(u.num_rounds for u in usages),
        num_draft_tokens=sum(u.num_draft_tokens for u in usages),
        num_accepted_tokens=sum(u.num_accepted_tokens for u in usages),
        drafter=next((u.drafter for u in usages if u.drafter is not None), None),
    )
