"""The engine's own thread: commands go in through a queue, outputs come back once a step.

    event loop                               engine thread
    stream(request) --- inbox: Add --------> engine.add
                    <-- one call a step ---- engine.step  -> every request's output of that step
    stream cancelled -- inbox: Abort ------> engine.abort

The engine is not thread-safe, so only this thread touches it; what others may know of its load is
a snapshot published after each step. Knows no Ray.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from magicdec.deployments.replica_api import EngineDied, EngineUnavailable
from magicdec.engine import Engine
from magicdec.stats import EngineLoad
from magicdec.types import Request, RequestError, RequestOutput

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Add | _Abort | _Stop
_Event = RequestOutput | RequestError | EngineDied | EngineUnavailable


class EngineLoop:
    """Drives one Engine. Create it on the event loop that will consume the streams.

    `on_fatal` is called on that loop, once, after every live stream was told.
    """

    def __init__(self, engine: Engine, on_fatal: Callable[[BaseException], None]) -> None:
        self._engine = engine
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[_Event]] = {}
        # As the engine thread last published it, with the number of requests it had taken by then.
        self._snapshot = (engine.load(), 0)
        self._num_submitted = 0
        self._num_taken = 0
        self._alive = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False from the moment that a step failed or `stop` was called."""
        return self._alive and self._thread.is_alive()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def load(self) -> EngineLoad:
        """As of the last step, with all that came since as waiting. Call it on the event loop."""
        load, num_taken = self._snapshot
        return replace(load, num_waiting=load.num_waiting + self._num_submitted - num_taken)

    async def stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """One item a step that progressed this request, the last with its finish reason.

        Closing or cancelling it aborts the request. Raises RequestError when the engine refuses
        it or its id is live already, EngineUnavailable or EngineDied (see there).
        """
        if not self.is_alive:
            raise EngineUnavailable("the engine has failed or stopped")
        if request.request_id in self._streams:  # its outputs would go to the older stream's queue
            raise RequestError(f"request {request.request_id} is live already", param="request_id")
        events: asyncio.Queue[_Event] = asyncio.Queue()
        self._streams[request.request_id] = events
        self._num_submitted += 1
        self._inbox.put(_Add(request))
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = not isinstance(event, RequestOutput) or event.finish_reason is not None
                if not isinstance(event, RequestOutput):
                    raise event
                yield event
        finally:
            del self._streams[request.request_id]
            if not finished:
                self._inbox.put(_Abort(request.request_id))

    def stop(self) -> None:
        """Ends the thread after the step in progress and releases the engine. Blocks.

        Streams that are still live raise EngineUnavailable.
        """
        self._alive = False
        self._inbox.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_commands():
                outputs = self._engine.step()
                self._publish(outputs)
            self._call(self._end, EngineUnavailable("the engine has stopped"))
            self._engine.shutdown()
        except BaseException as error:  # whatever it is, clients must hear of it
            logger.exception("the engine failed; every live request is told")
            self._alive = False
            self._call(self._fail, error)

    def _call(self, callback: Callable[[_T], None], argument: _T) -> None:
        """Runs it on the event loop, unless that has closed: then nobody is left to be told."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, argument)

    def _take_commands(self) -> bool:
        """Empties the inbox; waits on it while the engine has nothing to do. False: stop.

        An idle engine that has lost or shared a block fails here, before it serves anyone again.
        """
        while True:
            idle = not self._engine.has_unfinished()
            if idle:
                self._engine.check_integrity()
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(command, _Stop):
                return False
            self._apply(command)
            self._snapshot = (self._engine.load(), self._num_taken)

    def _apply(self, command: _Add | _Abort) -> None:
        if isinstance(command, _Abort):
            self._engine.abort(command.request_id)
            return
        self._num_taken += 1
        try:
            self._engine.add(command.request)
        except RequestError as error:
            refusal: list[tuple[str, _Event]] = [(command.request.request_id, error)]
            self._call(self._deliver, refusal)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        self._snapshot = (self._engine.load(), self._num_taken)
        if outputs:
            events: list[tuple[str, _Event]] = [(o.request_id, o) for o in outputs]
            self._call(self._deliver, events)

    def _deliver(self, events: list[tuple[str, _Event]]) -> None:
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:  # None: aborted while the step ran
                stream.put_nowait(event)

    def _fail(self, error: BaseException) -> None:
        self._end(EngineDied(f"the engine failed: {error!r}"))
        self._on_fatal(error)

    def _end(self, error: EngineDied | EngineUnavailable) -> None:
        for stream in self._streams.values():
            stream.put_nowait(error)
