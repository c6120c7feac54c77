"""Which shapes a profile times, the most telling first."""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from magicdec.config import OBSERVATION_WINDOW
from magicdec.drafters.self_draft import POLICIES
from magicdec.profiling.profile_probes import Probe, ProbePool
from magicdec.profiling.step_profile import MAX_CURVE_ROWS

_LEAST_CONTEXT = 64
_TWO_LENGTHS = (1, 4)  # of drafts: they tell what a round costs once from what each step costs
_ONE_LENGTH = (3,)  # where there is no time for both: the beginning is a small part of it
_FEW_ROWS = 2  # of a prompt, by which a view is chosen as well as by all


class Aspect(Enum):
    """What a measurement tells."""

    VERIFY = "verify"
    PREFILL = "prefill"
    OBSERVE = "observe"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Probes to be run once, then those to be timed, in turn and several times.

    OBSERVE times one without and one with the observation, of sequences that are new every time;
    DRAFT rounds of the same sequences, of two draft lengths or one. `instead` is taken where there
    is no time for this one.
    """

    aspect: Aspect
    warm_up: tuple[Probe, ...]
    timed: tuple[Probe, ...]
    instead: "Measurement | None" = None

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (*self.warm_up, *self.timed)


class MeasurementPlan:
    """Shapes spread over what the pool takes: batch, context, rows and draft budget by ratio."""

    def __init__(self, pool: ProbePool) -> None:
        self._pool = pool
        self._speculation = pool.config.speculation
        most = max(min(pool.config.scheduler.max_num_seqs, pool.num_blocks), 1)
        self._batch_sizes = _levels(1, most, 4)

    def queues(self) -> list[deque[Measurement]]:
        """To be taken from in turn; each begins with the corners of its range."""
        verify = [_alike(Aspect.VERIFY, probe) for probe in self._verify_probes()]
        aspects = [
            verify[0::2],
            [_alike(Aspect.VERIFY, probe) for probe in self._row_probes()],
            self._drafts(),
            verify[1::2],
            _in_turn(
                [_alike(Aspect.PREFILL, probe) for probe in self._prefill_probes()],
                self._observations(),
            ),
        ]
        return [
            deque(m for m in aspect if all(self._pool.fits(probe) for probe in m.probes))
            for aspect in aspects
        ]

    def _verify_probes(self) -> list[Probe]:
        num_rows = _levels(1, self._speculation.max_draft_length + 1, 4)
        return [
            _rows(*shape)
            for shape in _farthest_first(
                (batch, context, rows)
                for batch, rows in itertools.product(self._batch_sizes, num_rows)
                for context in self._contexts(batch, rows)
            )
        ]

    def _row_probes(self) -> list[Probe]:
        """Of one short sequence: the linears are all that its rows change."""
        most = min(self._speculation.max_draft_length + 1, MAX_CURVE_ROWS)
        contexts = self._contexts(1, most)
        num_rows = _farthest_first((n,) for n in _levels(1, most, 9))[1:]  # a verify probe is first
        return [_rows(1, contexts[0], n) for (n,) in num_rows] if contexts else []

    def _prefill_probes(self) -> list[Probe]:
        num_rows = _levels(OBSERVATION_WINDOW, self._pool.config.scheduler.max_batch_tokens, 4)
        return [
            Probe(1, context, num_rows=rows)
            for rows, context in _farthest_first(
                (rows, context) for rows in num_rows for context in self._contexts(1, rows)
            )
        ]

    def _observations(self) -> list[Measurement]:
        """Of a prompt's last rows, and of a round's; over a short context they take no time."""
        budget = self._draft_budgets()[0]
        rounds = [name for name, policy in POLICIES.items() if policy.observes_rounds]
        plain: list[tuple[str, Probe]] = []
        most = self._pool.longest_context(1, OBSERVATION_WINDOW)
        for context in (most // 4, most):
            prompt = Probe(1, context, OBSERVATION_WINDOW, ends_prompt=True)
            plain += [("snapkv", prompt), *((name, _rows(1, context, 2)) for name in rounds)]
        return [
            Measurement(Aspect.OBSERVE, (shown,), (probe, shown))
            for name, probe in plain
            for shown in (replace(probe, drafter=name, draft_budget=budget),)
        ]

    def _drafts(self) -> list[Measurement]:
        """Self-drafters run the same steps: they take the shapes of one list in turn."""
        shapes = _farthest_first(itertools.product(self._batch_sizes, self._draft_budgets()))
        own = [
            self._rounds(name, Probe(batch, 2 * budget, draft_budget=budget))
            for (batch, budget), name in zip(shapes, itertools.cycle(POLICIES), strict=False)
        ]
        others = [self._rounds("draft_model", probe) for probe in self._draft_model_probes()]
        return _in_turn(own, others)

    def _rounds(self, drafter: str, probe: Probe) -> Measurement:
        one = self._rounds_of(drafter, probe, _ONE_LENGTH)
        return replace(self._rounds_of(drafter, probe, _TWO_LENGTHS), instead=one)

    def _rounds_of(self, drafter: str, probe: Probe, wanted: tuple[int, ...]) -> Measurement:
        """First the view is chosen: by a round where the drafter observes those, or by a prompt."""
        lengths = sorted({min(n, self._speculation.max_draft_length) for n in wanted})
        rounds = [replace(probe, drafter=drafter, draft_length=n) for n in lengths]
        warm_up = [replace(rounds[0], draft_length=1)]
        policy = POLICIES.get(drafter)
        if policy is not None and policy.observes_prompt and not policy.observes_rounds:
            prompt = replace(warm_up[0], draft_length=0, num_rows=_FEW_ROWS, ends_prompt=True)
            warm_up = [replace(prompt, context_len=probe.context_len - _FEW_ROWS), *warm_up]
        return Measurement(Aspect.DRAFT, tuple(warm_up), tuple(rounds))

    def _draft_model_probes(self) -> list[Probe]:
        """Short contexts: the first forward feeds the draft model all that it is to remember."""
        draft_model = self._speculation.draft_model
        if draft_model is None:
            return []
        most = draft_model.window or 8 * _LEAST_CONTEXT
        contexts = _levels(min(_LEAST_CONTEXT, most), most, 2)
        shapes = _farthest_first(itertools.product(self._batch_sizes, contexts))
        return [Probe(batch, context) for batch, context in shapes]

    def _contexts(self, batch_size: int, num_rows: int) -> list[int]:
        most = self._pool.longest_context(batch_size, num_rows)
        return _levels(min(_LEAST_CONTEXT, most), most, 4) if most >= 1 else []

    def _draft_budgets(self) -> list[int]:
        """An eighth of the longest context at most: what is larger costs much and tells little."""
        longest = max(_TWO_LENGTHS)
        least = self._speculation.least_draft_budget(longest)
        most = self._pool.longest_context(1, 1 + longest) // 8
        return _levels(least, max(min(most, self._speculation.max_draft_budget), least), 3)


def _rows(batch_size: int, context_len: int, rows: int) -> Probe:
    """Verify rows drafted by `ngram`, whose drafts take next to no time."""
    drafter = "ngram" if rows > 1 else None
    return Probe(batch_size, context_len, drafter=drafter, draft_length=rows - 1)


def _alike(aspect: Aspect, probe: Probe) -> Measurement:
    return Measurement(aspect, (probe,), (probe,))


def _in_turn(*queues: list[Measurement]) -> list[Measurement]:
    return [m for row in itertools.zip_longest(*queues) for m in row if m is not None]


def _levels(least: int, most: int, count: int) -> list[int]:
    """At most `count` whole numbers from least to most, ascending in equal ratios."""
    return sorted({round(v) for v in np.geomspace(least, most, count).tolist()})


def _farthest_first(points: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The least first, then always the one farthest from all before it, by ratio and range."""
    ordered = sorted(set(points))
    if not ordered:
        return []
    logs = np.log(np.array(ordered, dtype=float))  # [num_points, num_dimensions]
    logs /= np.maximum(np.ptp(logs, axis=0), 1e-9)
    picks, distances = [0], np.linalg.norm(logs - logs[0], axis=1)
    while len(picks) < len(ordered):
        picks.append(int(np.argmax(distances)))
        distances = np.minimum(distances, np.linalg.norm(logs - logs[picks[-1]], axis=1))
    return [ordered[i] for i in picks]
