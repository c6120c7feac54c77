"""Server-sent events over choices that the test scripts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from magicdec.deployments.responses import ResponseFormat
from magicdec.deployments.streaming import DONE, KEEP_ALIVE, Choices, stream_events
from magicdec.types import FinishReason, Request, RequestOutput, Usage

USAGE = Usage(1, 1)
KEEP_ALIVE_S = 0.1


class Rounds:
    """A dispatcher: `num_silent` rounds without text, then the end."""

    def __init__(self, num_silent: int, period_s: float) -> None:
        self._num_silent = num_silent
        self._period_s = period_s

    async def stream(self, request: Request) -> AsyncIterator[RequestOutput]:
        for _ in range(self._num_silent):
            await asyncio.sleep(self._period_s)
            yield RequestOutput(request.request_id, (5,), "", USAGE)
        yield RequestOutput(request.request_id, (5,), "end", USAGE, FinishReason.STOP)


async def events(rounds: Rounds, *, with_token_ids: bool = False) -> list[bytes]:
    choices = Choices(cast(Any, rounds), [Request("r", (1,))])
    response = ResponseFormat.new(chat=False, model="m", with_token_ids=with_token_ids)
    written = stream_events(choices, response, with_usage=False, keep_alive_s=KEEP_ALIVE_S)
    return [event async for event in written]


async def test_rounds_without_text_do_not_break_the_keep_alive() -> None:
    written = await events(Rounds(25, KEEP_ALIVE_S / 5))
    assert written.count(KEEP_ALIVE) >= 3
    assert len(written) == written.count(KEEP_ALIVE) + 2
    assert b'"end"' in written[-2] and written[-1] == DONE


async def test_silence_is_kept_alive() -> None:
    written = await events(Rounds(1, 3.5 * KEEP_ALIVE_S))
    assert written.count(KEEP_ALIVE) >= 2


async def test_no_comment_while_chunks_are_written() -> None:
    written = await events(Rounds(6, KEEP_ALIVE_S / 20), with_token_ids=True)
    assert written.count(KEEP_ALIVE) == 0
    assert len(written) == 8
