"""The engine's own thread: commands go in through a queue, outputs come back once a step.

    event loop                               engine thread
    stream(request) --- inbox: Add --------> engine.add
                    <-- one call a step ---- engine.step  -> every request's output of that step
    stream cancelled -- inbox: Abort ------> engine.abort
    take_policy, once a second: Tell ------> engine.policy.snapshot
    merge_policy ------ inbox: Merge ------> engine.policy.merge
    take_counts ------- inbox: Count ------> engine.take_counts

The engine is not thread-safe, so only this thread touches it; what others may know of its load is
a snapshot published after each step. Knows no Ray.
"""

import asyncio
import logging
import math
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.deployments.engine_commands import (
    Abort,
    Add,
    Command,
    Count,
    Inflow,
    Merge,
    Stop,
    Tell,
)
from magicdec.deployments.replica_api import EngineDied, EngineUnavailable
from magicdec.engine import Engine
from magicdec.round_tally import EngineCounts
from magicdec.stats import EngineLoad
from magicdec.types import Request, RequestError, RequestOutput

logger = logging.getLogger(__name__)

POLICY_PERIOD_S = 1.0  # a snapshot and a merge are some milliseconds of the engine's thread

_T = TypeVar("_T")


_Event = RequestOutput | RequestError | EngineDied | EngineUnavailable


class EngineLoop:
    """Drives one Engine. Create it on the event loop that will consume the streams.

    `on_fatal` is called on that loop, once, after every live stream was told.
    """

    def __init__(self, engine: Engine, on_fatal: Callable[[BaseException], None]) -> None:
        self._engine = engine
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[_Event]] = {}
        # As the engine thread last published it, with what it had taken from the inbox by then.
        self._taken = Inflow()
        self._snapshot = (engine.load(), self._taken)
        self._submitted = Inflow()
        self._policy: PolicySnapshot | None = None  # as last told, until somebody takes it
        self._policy_due = 0.0  # when to ask for it again, on the event loop's clock
        self._counts: EngineCounts | None = None  # likewise
        self._counts_asked = False
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
        load, taken = self._snapshot
        num_tokens = self._submitted.num_tokens - taken.num_tokens
        return replace(
            load,
            num_waiting=load.num_waiting + self._submitted.num_requests - taken.num_requests,
            num_prefill_tokens=load.num_prefill_tokens + num_tokens,
            num_waiting_tokens=load.num_waiting_tokens + num_tokens,
        )

    def take_policy(self) -> PolicySnapshot | None:
        """What the engine has learnt, about once a second; None between, and where its plan is
        fixed. Call it again and again, on the event loop: each call may ask for the next."""
        now = self._loop.time()
        if now >= self._policy_due:
            self._policy_due = math.inf  # one question at a time: a step may take longer
            self._inbox.put(Tell())
        policy, self._policy = self._policy, None
        return policy

    def merge_policy(self, others: PolicySnapshot) -> None:
        """What other replicas know, in place of what was merged before. Whatever is submitted
        after this runs by it."""
        self._inbox.put(Merge(others))

    def take_counts(self) -> EngineCounts | None:
        """What has happened since the engine answered before; None while it has not answered the
        last call. Call it again and again, on the event loop: each call asks for the next."""
        counts, self._counts = self._counts, None
        if not self._counts_asked:
            self._counts_asked = True
            self._inbox.put(Count())
        return counts

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
        self._submitted = self._submitted.plus(request)
        self._inbox.put(Add(request))
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
                self._inbox.put(Abort(request.request_id))

    def stop(self) -> None:
        """Ends the thread after the step in progress and releases the engine. Blocks.

        Streams that are still live raise EngineUnavailable.
        """
        self._alive = False
        self._inbox.put(Stop())
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
            if isinstance(command, Stop):
                return False
            self._apply(command)
            self._snapshot = (self._engine.load(), self._taken)

    def _apply(self, command: Add | Abort | Tell | Count | Merge) -> None:
        match command:
            case Add(request):
                self._add(request)
            case Abort(request_id):
                self._engine.abort(request_id)
            case Tell():
                self._call(self._hear, self._engine.policy.snapshot())
            case Count():
                self._call(self._hear_counts, self._engine.take_counts())
            case Merge(others):
                self._engine.policy.merge(others)

    def _add(self, request: Request) -> None:
        self._taken = self._taken.plus(request)
        try:
            self._engine.add(request)
        except RequestError as error:
            refusal: list[tuple[str, _Event]] = [(request.request_id, error)]
            self._call(self._deliver, refusal)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        self._snapshot = (self._engine.load(), self._taken)
        if outputs:
            events: list[tuple[str, _Event]] = [(o.request_id, o) for o in outputs]
            self._call(self._deliver, events)

    def _deliver(self, events: list[tuple[str, _Event]]) -> None:
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:  # None: aborted while the step ran
                stream.put_nowait(event)

    def _hear(self, policy: PolicySnapshot | None) -> None:
        self._policy = policy
        if policy is not None:  # a fixed plan stays fixed
            self._policy_due = self._loop.time() + POLICY_PERIOD_S

    def _hear_counts(self, counts: EngineCounts) -> None:
        self._counts, self._counts_asked = counts, False

    def _fail(self, error: BaseException) -> None:
        self._end(EngineDied(f"the engine failed: {error!r}"))
        self._on_fatal(error)

    def _end(self, error: EngineDied | EngineUnavailable) -> None:
        for stream in self._streams.values():
            stream.put_nowait(error)
