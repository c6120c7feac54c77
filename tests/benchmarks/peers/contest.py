"""What is asked of every contender, and what it answers: one JSON object a line.

Standard library only: it is imported in environments that are not this project's.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Task:
    """A batch to be decoded. A contender keeps the prompts' K/V from one task to the next."""

    prompts: list[list[int]]
    num_tokens: int  # of each answer; its end-of-text token does not end it
    temperature: float  # 0: greedy
    top_p: float
    seed: int
    adaptive: bool = True  # else plain decoding, where a contender has both


@dataclass(frozen=True, slots=True)
class Answer:
    """Times by the contender's own clock."""

    begin_seconds: float  # until every sequence had a token: prefill, where nothing is kept yet
    seconds: float  # from then until the first sequence ended
    num_tokens: int  # of all sequences in that time
    token_ids: list[list[int]]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


class Watch:
    """The time in which a whole batch decodes: speculation ends sequences at different times."""

    def __init__(self, task: Task) -> None:
        self._num_tokens = task.num_tokens
        self._answers: list[list[int]] = [[] for _ in task.prompts]
        self._started = time.perf_counter()
        self._begun: tuple[float, int] | None = None  # seconds, tokens then
        self._ended: tuple[float, int] | None = None

    def add(self, new: Sequence[tuple[int, Sequence[int]]]) -> None:
        """The tokens that one step gave: of which sequence, and which."""
        for index, token_ids in new:
            self._answers[index].extend(token_ids)
        now = time.perf_counter(), sum(map(len, self._answers))
        if self._begun is None and all(self._answers):
            self._begun = now
        if self._ended is None and any(len(a) >= self._num_tokens for a in self._answers):
            self._ended = now

    def answer(self) -> Answer:
        """Raises RuntimeError where a sequence has no token or none has all of its own."""
        if self._begun is None or self._ended is None:
            raise RuntimeError(f"answers of {[len(a) for a in self._answers]} tokens")
        (begun, before), (ended, after) = self._begun, self._ended
        cut = [answer[: self._num_tokens] for answer in self._answers]
        return Answer(begun - self._started, ended - begun, after - before, cut)


def claim_stdout() -> TextIO:
    """Standard output for answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, load: Callable[[], Callable[[Task], Answer]]) -> None:
    """Loads, says {"ready": true}, and answers each task with an Answer's fields, or {"error"}."""
    try:
        decode = load()
    except Exception as error:
        return _write(answers, {"error": f"{type(error).__name__}: {error}"})
    _write(answers, {"ready": True})
    for line in sys.stdin:
        try:
            _write(answers, asdict(decode(Task(**json.loads(line)))))
        except Exception as error:
            _write(answers, {"error": f"{type(error).__name__}: {error}"})
    return None


def _write(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
