"""The nouns of a request: what a client asks, and what comes back.

Imports nothing of ours and no torch, so that a stateless ingress can use it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

MAX_STOP_STRINGS = 16
MAX_SEED = 2**64 - 1
MIN_TEMPERATURE = 1e-5  # below, fp32 scores overflow
AUTO = "auto"  # a field that is left to the server


class RequestError(ValueError):
    """A request that cannot be served as asked. The message names field, value and limit.

    `param` is the field in OpenAI's naming, `code` OpenAI's error code or None.
    """

    def __init__(self, message: str, *, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_request_error, (self.message, self.param, self.code))


def _rebuild_request_error(message: str, param: str, code: str | None) -> RequestError:
    return RequestError(message, param=param, code=code)


def check_range(param: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless low <= value <= high (NaN is refused)."""
    if not low <= value <= high:
        raise RequestError(f"{param} must be between {low} and {high}, got {value}", param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. `temperature` 0 is greedy.

    Processors apply in this order: penalties, bias, temperature, top-k, top-p, min-p. Presence and
    frequency penalties count output tokens, the repetition penalty prompt and output (the field's
    convention). Raises RequestError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise RequestError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, "
                f"got {self.temperature}",
                param="temperature",
            )
        check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be above 0, got 0.0", param="top_p")
        check_range("top_k", self.top_k, 0, 2**31 - 1)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for token_id, bias in self.logit_bias:
            check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", param="stop"
            )
        if any(not s for s in self.stop):
            raise RequestError("stop must not hold an empty string", param="stop")

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """What one request asks of the draft; None leaves a field to the server.

    It changes how fast tokens come, never which (under shared noise). `draft_budget` is a number of
    KV positions, or, below 1, a share of the context. Limits are the server's: draft_choice.py.
    """

    enabled: bool = True
    drafter: str | None = None
    draft_length: int | None = None
    draft_budget: float | None = None

    @property
    def leaves_all(self) -> bool:
        """To the server: nothing is switched off, named or set."""
        return (
            self.enabled
            and self.drafter in (None, AUTO)
            and self.draft_length is None
            and self.draft_budget is None
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked, in token ids.

    `emitted_token_ids` is the journal of a stream that another replica began: those tokens count
    as output already sent (penalties, max_tokens, noise positions and the stop buffer are rebuilt
    from them) and are not sent again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    emitted_token_ids: tuple[int, ...] = ()
    speculation: SpeculationParams = field(default_factory=SpeculationParams)


class FinishReason(Enum):
    STOP = "stop"  # EOS, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"


class Usage(NamedTuple):
    """Token counts of one request up to now.

    A round is one verify pass over a decode row, with or without a draft; the first token comes
    from the prefill and belongs to none. `drafter` drafted for it last; None: nothing was drafted.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, in the prefix cache when first admitted
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafter: str | None = None

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a round, the recovered or bonus token included; 0 before the first round."""
        if self.num_rounds == 0:
            return 0.0
        return 1.0 + self.num_accepted_tokens / self.num_rounds


class RequestOutput(NamedTuple):
    """What one step added to one request. `text` may lag `token_ids` by a held-back stop prefix."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    usage: Usage
    finish_reason: FinishReason | None = None
