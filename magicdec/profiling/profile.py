"""The start-up profile: real steps of the executor at hand, timed and fitted into a CostModel.

It runs before the first request, while every page is free, and leaves nothing behind: drafters
forget its sequences, no page is registered, and what a page holds is read only where a sequence
has written it.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from magicdec.batch import StepResult
from magicdec.config import EngineConfig
from magicdec.executor import Executor
from magicdec.profiling.profile_plan import Aspect, Measurement, MeasurementPlan
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.profiling.profile_samples import Hardware, ProfileSamples
from magicdec.profiling.step_profile import StepProfile
from magicdec.types import SamplingParams

logger = logging.getLogger(__name__)

SECONDS = 8.0  # that a profile may take, where nobody says otherwise
_MOST_OF_TIME = 1 / 6  # of these for one measurement: what takes longer is left to the fit
_MEASUREMENT_SECONDS = 0.2  # after which nothing is repeated
_MAX_REPEATS = 3
_STALL = 1.3  # times what the warm-up leads to expect at most: measured again


def profile_executor(
    executor: Executor,
    config: EngineConfig,
    max_model_len: int,
    hardware: Hardware,
    *,
    seconds: float = SECONDS,
    sampling: SamplingParams | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepProfile:
    """The cost of every kind of step that ProfiledRoundCosts asks for.

    Steps sample as `sampling` says (None: at temperature 1, as for requests that say nothing),
    which over a large vocabulary takes long enough to count. Shapes for which `seconds` leave no
    time get what the fit makes of the others; without any, the roofline stands. Raises
    ExecutorError when a rank fails.
    """
    started = clock()
    pool = ProbePool(config, executor.num_blocks, max_model_len)
    samples = ProfileSamples(hardware, config)
    profiler = _Profiler(executor, pool, samples, sampling or SamplingParams(), clock)
    num_taken = profiler.run(started + seconds, _MOST_OF_TIME * seconds)
    logger.info("profile: %d shapes in %.1f s", num_taken, clock() - started)
    return replace(samples.fit(), num_shapes=num_taken)


class _Profiler:
    """Takes measurements while there is time."""

    def __init__(
        self,
        executor: Executor,
        pool: ProbePool,
        samples: ProfileSamples,
        sampling: SamplingParams,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._pool = pool
        self._samples = samples
        self._sampling = sampling
        self._clock = clock
        self._sequence_ids = itertools.count()
        self._known: tuple[int, ...] = ()  # to drafters
        self._steps: list[tuple[float, float]] = []  # seconds by the roofline, and how many times

    def run(self, deadline: float, most_seconds: float) -> int:
        """Returns how many measurements were taken."""
        num_taken, goes_on = 0, True
        queues = MeasurementPlan(self._pool).queues()
        while goes_on:
            goes_on = False
            for queue in queues:
                chosen = self._next(queue, min(deadline - self._clock(), most_seconds))
                if chosen is not None:
                    self._take(chosen)
                    num_taken, goes_on = num_taken + 1, True
        if self._known:
            # Ids leave with a step. This one's own stay unknown: nobody drafts for it.
            self._step(Probe(1, 1), self._new_ids(1))
        return num_taken

    def _next(self, queue: deque[Measurement], seconds: float) -> Measurement | None:
        """The first that is expected to take no longer, or else what there is instead of it.

        A measurement takes all of its probes once at least, as long as by the roofline and by how
        far that was off until now.
        """
        slower = self._slowdown()
        for place, measurement in enumerate(queue):
            chosen: Measurement | None = measurement
            while chosen is not None:
                roofline = sum(self._samples.roofline_seconds(probe) for probe in chosen.probes)
                if slower * roofline <= seconds:
                    del queue[place]
                    return chosen
                chosen = chosen.instead
        return None

    def _slowdown(self) -> float:
        """How many times the roofline steps take, by half of its seconds: one stall moves no
        median, and what short steps take beside it says little of the long ones."""
        left = sum(roofline for roofline, _ in self._steps) / 2
        for roofline, times in sorted(self._steps, key=lambda step: step[1]):
            left -= roofline
            if left <= 0.0:
                return times
        return 1.0

    def _take(self, measurement: Measurement) -> None:
        started, count = self._clock(), measurement.timed[0].batch_size
        ids = self._new_ids(count)
        for probe in measurement.warm_up:
            warm = _seconds(self._step(probe, ids)) / max(probe.draft_length, 1)
        results: list[list[StepResult]] = [[] for _ in measurement.timed]
        advance = 0
        while len(results[0]) < _MAX_REPEATS:
            stalled = False
            for probe, found in zip(measurement.timed, results, strict=True):
                if measurement.aspect is Aspect.DRAFT:
                    advance += 1 + probe.draft_length // 2  # as if half the drafts were accepted
                elif measurement.aspect is Aspect.OBSERVE:
                    ids = self._new_ids(count)  # a view is chosen for whoever has none
                found.append(self._step(probe, ids, advance))
                stalled |= _seconds(found[-1]) > _STALL * warm * max(probe.draft_length, 1)
            if not stalled and self._clock() - started > _MEASUREMENT_SECONDS:
                break
        self._samples.add(measurement, results)

    def _step(self, probe: Probe, ids: tuple[int, ...], advance: int = 0) -> StepResult:
        released = () if ids == self._known else self._known
        self._known = ids
        batch = self._pool.batch(probe, ids, self._sampling, advance, released)
        started = self._clock()
        result = self._executor.execute(batch)
        roofline = self._samples.roofline_seconds(probe)
        self._steps.append((roofline, (self._clock() - started) / roofline))
        return result

    def _new_ids(self, count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(self._sequence_ids, count))


def _seconds(result: StepResult) -> float:
    return result.draft_seconds + result.verify_seconds
