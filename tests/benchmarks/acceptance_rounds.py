"""Which drafted positions a stream examined, read off the engine's outputs round by round.

Verification examines a drafted token when all drafts before it in its round stood: the accepted
ones and the first one rejected. The token after a draft that was accepted whole, the bonus token,
is no draft and is not examined.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from magicdec.engine import Engine
from magicdec.types import Request, RequestOutput, Usage


@dataclass(frozen=True, slots=True)
class Round:
    """One verify pass. `position` counts the stream's output tokens before it."""

    position: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def examined(self) -> list[tuple[int, bool]]:
        """(output position, accepted) of each examined draft."""
        accepted = [(self.position + i, True) for i in range(self.num_accepted_tokens)]
        if self.num_accepted_tokens == self.num_draft_tokens:
            return accepted
        return [*accepted, (self.position + self.num_accepted_tokens, False)]

    @property
    def stop(self) -> int:
        """Output tokens after the round: its recovered or bonus token is the last."""
        return self.position + self.num_accepted_tokens + 1


@dataclass(slots=True)
class Stream:
    """What one request gave."""

    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    cached_tokens: int = 0
    _last: Usage = field(default_factory=lambda: Usage(0, 0))

    def append(self, output: RequestOutput) -> None:
        """Raises ValueError for an output that covers two rounds: their drafts cannot be told."""
        usage, last = output.usage, self._last
        num_rounds = usage.num_rounds - last.num_rounds
        if num_rounds > 1:
            raise ValueError(f"request {output.request_id}: {num_rounds} rounds in one output")
        if num_rounds == 1:
            drafted = usage.num_draft_tokens - last.num_draft_tokens
            accepted = usage.num_accepted_tokens - last.num_accepted_tokens
            self.rounds.append(Round(len(self.token_ids), drafted, accepted))
        self.token_ids.extend(output.token_ids)
        self.cached_tokens = usage.cached_tokens
        self._last = usage


def first_divergence(token_ids: list[int], plain: list[int]) -> int | None:
    """The first position where a stream left the plain one; None where it never did."""
    pairs = enumerate(zip(token_ids, plain, strict=False))
    return next((i for i, (token, other) in pairs if token != other), None)


@dataclass(slots=True)
class Acceptance:
    """What the drafts of some streams came to, over the first `answer_length` tokens of each.

    A stream counts up to where it leaves the plain one: after that the drafter saw another text.
    """

    bucket: int  # output positions counted together
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    examined: int = 0
    streams: int = 0
    diverged: int = 0
    compared: int = 0  # tokens that are the plain stream's, and the one that is not
    by_position: list[list[int]] = field(default_factory=list)  # [accepted, examined] a bucket

    def add(self, stream: Stream, plain: list[int], answer_length: int) -> None:
        cut = first_divergence(stream.token_ids[:answer_length], plain)
        self.streams += 1
        self.diverged += cut is not None
        self.compared += answer_length if cut is None else cut + 1
        limit = len(plain) if cut is None else cut
        for done in stream.rounds:
            if done.position < answer_length and done.stop <= limit:
                self._add(done, answer_length)

    def _add(self, done: Round, answer_length: int) -> None:
        self.rounds += 1
        self.drafted += min(done.num_draft_tokens, answer_length - done.position)
        for position, stands in done.examined:
            if position < answer_length:
                self.accepted += stands
                self.examined += 1
                self._bucket(position)[0] += stands
                self._bucket(position)[1] += 1

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def _bucket(self, position: int) -> list[int]:
        while len(self.by_position) <= position // self.bucket:
            self.by_position.append([0, 0])
        return self.by_position[position // self.bucket]


def distinct_4grams(streams: Iterable[list[int]]) -> float:
    """The share of 4-grams that are different ones; a loop drafts itself. 0 for too short a text"""
    grams = [tuple(s[i : i + 4]) for s in streams for i in range(len(s) - 3)]
    return len(set(grams)) / max(len(grams), 1)


def generate(
    engine: Engine, requests: list[Request], report: Callable[[int, float], None]
) -> dict[str, Stream]:
    """Runs the requests to their ends; report(tokens so far, seconds) comes now and then."""
    streams = {request.request_id: Stream() for request in requests}
    for request in requests:
        engine.add(request)
    started = reported = time.perf_counter()
    num_tokens = 0
    while engine.has_unfinished():
        for output in engine.step():
            streams[output.request_id].append(output)
            num_tokens += len(output.token_ids)
        now = time.perf_counter()
        if now - reported > 20:
            report(num_tokens, now - started)
            reported = now
    return streams
