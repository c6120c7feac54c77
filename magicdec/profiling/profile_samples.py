"""Timed steps by kind, and the CostModel that explains them."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from magicdec.batch import StepResult
from magicdec.config import EngineConfig
from magicdec.control.round_shapes import RoundShapes
from magicdec.cost_model import (
    VERIFY,
    CostModel,
    Floats,
    StepCost,
    StepShape,
    draft_kind,
    fit_step_cost,
)
from magicdec.drafters.self_draft import POLICIES
from magicdec.profiling.profile_plan import Aspect, Measurement
from magicdec.profiling.profile_probes import Probe
from magicdec.profiling.step_profile import (
    MAX_CURVE_ROWS,
    PREFILL,
    StepProfile,
    begin_kind,
    observe_kind,
    prompt_kind,
)
from magicdec.roofline import Device, ModelGeometry, roofline_cost

_OBSERVE = "observe"  # of all drafters: they look in the same way
_BEGIN_SHARES = (0.02, 0.75)  # of a round of one step: what noise may make of its beginning
_SHRINKAGE = 0.2  # of departures: short steps that would speak for the model alone
_ROUNDS = 4  # in which the model and the departures from it settle
_NOTHING = StepCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a roofline is made from: the models' shapes, and what the slowest rank sustains."""

    geometry: ModelGeometry
    device: Device
    draft_geometry: ModelGeometry | None = None  # of the draft model, where there is one


def profile_kinds(config: EngineConfig) -> frozenset[str]:
    """What a profile of an engine of that configuration has a cost of."""
    drafters = {*POLICIES, "ngram"}
    if config.speculation.draft_model is not None:
        drafters.add("draft_model")
    policies = POLICIES.items()
    return frozenset(
        {VERIFY, PREFILL}
        | {kind(name) for name in drafters for kind in (draft_kind, begin_kind)}
        | {prompt_kind(name) for name, policy in policies if policy.observes_prompt}
        | {observe_kind(name) for name, policy in policies if policy.observes_rounds}
    )


class ProfileSamples:
    """Collects what measurements tell; `fit` may be asked at any time."""

    def __init__(self, hardware: Hardware, config: EngineConfig) -> None:
        """Raises ValueError where the roofline does: more ranks than query heads."""
        self._config = config
        self._shapes = RoundShapes(hardware.geometry, config.speculation)
        num_ranks = config.parallel.tensor_parallel_size
        self._roofline = roofline_cost(hardware.geometry, hardware.device, num_ranks)
        self._draft_model = _draft_model_roofline(hardware)
        self._found: dict[str, list[tuple[StepShape, float]]] = defaultdict(list)
        # By drafter: the shape of a step, how many a round had, and its seconds.
        self._rounds: dict[str, list[tuple[StepShape, int, float]]] = defaultdict(list)

    def add(self, measurement: Measurement, results: Sequence[Sequence[StepResult]]) -> None:
        """`results`: of each timed probe, in the order of its repeats; at least one each."""
        probe = measurement.timed[0]
        if measurement.aspect is Aspect.DRAFT:
            self._add_drafts(measurement.timed, results)
        elif measurement.aspect is Aspect.OBSERVE:
            pairs = zip(*results, strict=True)
            extra = [shown.verify_seconds - plain.verify_seconds for plain, shown in pairs]
            contexts = np.full(probe.batch_size, float(probe.end))
            shape = replace(self._shapes.rows(contexts, probe.rows), num_rows=0, num_sequences=0)
            self._found[_OBSERVE].append((shape, statistics.median_low(extra)))
        elif measurement.aspect is Aspect.PREFILL:
            chunk = self._shapes.chunk(probe.num_rows, probe.num_rows * probe.end)
            self._found[PREFILL].append((chunk, _verify_median(results[0])))
        else:
            self._add_verify(probe, results[0])
            if probe.drafter is not None:
                seconds = statistics.median_low(r.draft_seconds for r in results[0])
                shape = _kv_alone(self._shapes.rows(_contexts(probe)))
                self._found[begin_kind(probe.drafter)].append((shape, seconds))

    def roofline_seconds(self, probe: Probe) -> float:
        """What the probe's whole step would take."""
        rows = self._shapes.rows(_contexts(probe), probe.rows)
        seconds = self._roofline.seconds(rows)
        if probe.drafter in POLICIES:
            seconds += probe.draft_length * self._roofline.seconds(self._draft_shape(probe))
        elif probe.drafter == "draft_model":
            row = StepShape(probe.batch_size, 0.0, 0.0, 0)
            history = StepShape(probe.batch_size * probe.context_len, 0.0, 0.0, 0)
            seconds += probe.draft_length * self._draft_model.seconds(row)
            seconds += self._draft_model.seconds(history)  # K/V that it may have to compute first
        return seconds

    def fit(self) -> StepProfile:
        """Kinds without samples keep what is known of their relatives, or the roofline."""
        profile = StepProfile(CostModel({VERIFY: self._roofline}))
        for _ in range(_ROUNDS):
            model = CostModel({VERIFY: self._fit([VERIFY], self._roofline, profile)})
            profile = StepProfile(model, self._departures(model.cost(VERIFY)))
        verify = profile.model.cost(VERIFY)
        observe = self._fit(
            [_OBSERVE], replace(verify, fixed=0.0, weights=0.0, per_row=0.0, per_sequence=0.0)
        )
        costs = {VERIFY: verify, PREFILL: self._fit([PREFILL], verify, profile)}
        begin = self._fit([begin_kind(name) for name in POLICIES], _NOTHING)
        step = self._fit_steps(list(POLICIES), begin, verify, profile)
        for name, policy in POLICIES.items():
            # Views differ, steps do not: fits of their own would have a third of the samples each.
            costs[begin_kind(name)], costs[draft_kind(name)] = begin, step
            if policy.observes_prompt:
                costs[prompt_kind(name)] = observe
            if policy.observes_rounds:
                costs[observe_kind(name)] = observe
        others = {"ngram": _NOTHING}
        if self._config.speculation.draft_model is not None:
            others["draft_model"] = self._draft_model
        for name, prior in others.items():
            costs[begin_kind(name)] = self._fit([begin_kind(name)], _NOTHING)
            costs[draft_kind(name)] = self._fit_steps([name], costs[begin_kind(name)], prior)
        return StepProfile(CostModel(costs), profile.row_seconds)

    def _fit(
        self, kinds: Iterable[str], prior: StepCost, profile: StepProfile | None = None
    ) -> StepCost:
        return _fit([s for kind in kinds for s in self._found[kind]], prior, profile)

    def _fit_steps(
        self,
        drafters: Iterable[str],
        begin: StepCost,
        prior: StepCost,
        profile: StepProfile | None = None,
    ) -> StepCost:
        """To what the beginning leaves of the rounds, a step."""
        rounds = [found for name in drafters for found in self._rounds[name]]
        samples = [
            (shape, (seconds - begin.seconds(_kv_alone(shape))) / num_steps)
            for shape, num_steps, seconds in rounds
        ]
        return _fit(samples, prior, profile)

    def _departures(self, verify: StepCost) -> tuple[tuple[int, float], ...]:
        """What the model leaves unexplained, by rows. Long steps weigh little, and where there are
        no others nothing is said: of what is wrong in them the linears are the smallest part."""
        samples = [(s, t) for s, t in self._found[VERIFY] if s.num_rows <= MAX_CURVE_ROWS and t > 0]
        shortest = min((t for _, t in samples), default=0.0)
        by_rows: dict[int, list[tuple[float, float]]] = defaultdict(list)  # (weight, seconds)
        for shape, t in samples:
            by_rows[shape.num_rows].append(((shortest / t) ** 2, t - verify.seconds(shape)))
        weights = {rows: sum(w for w, _ in found) for rows, found in sorted(by_rows.items())}
        return tuple(
            (rows, sum(w * t for w, t in by_rows[rows]) / (_SHRINKAGE + weight))
            for rows, weight in weights.items()
            if weight > _SHRINKAGE
        )

    def _add_verify(self, probe: Probe, results: Sequence[StepResult]) -> None:
        """By the rows that were drafted, which may be fewer than asked for."""
        drafted = statistics.median_low(
            sum(s.num_draft_tokens for s in result.sequences) for result in results
        )
        plain = self._shapes.rows(_contexts(probe))
        num_rows = probe.batch_size + round(drafted)
        products = plain.row_products * num_rows / probe.batch_size
        shape = StepShape(num_rows, plain.kv_bytes, products, probe.batch_size)
        self._found[VERIFY].append((shape, _verify_median(results)))

    def _add_drafts(self, probes: Sequence[Probe], results: Sequence[Sequence[StepResult]]) -> None:
        drafter, shape = probes[0].drafter, self._draft_shape(probes[0])
        assert drafter is not None
        seconds = [statistics.median_low(r.draft_seconds for r in found) for found in results]
        first, last = probes[0].draft_length, probes[-1].draft_length
        for probe, taken in zip(probes, seconds, strict=True):
            self._rounds[drafter].append((shape, probe.draft_length, taken))
        if last > first:
            begin = (last * seconds[0] - first * seconds[-1]) / (last - first)
            least, most = (share * seconds[0] for share in _BEGIN_SHARES)
            sample = _kv_alone(shape), min(max(begin, least), most)
            self._found[begin_kind(drafter)].append(sample)
        if drafter not in POLICIES or not POLICIES[drafter].observes_rounds:
            for probe, found in zip(probes, results, strict=True):
                self._add_verify(probe, found)

    def _draft_shape(self, probe: Probe) -> StepShape:
        assert probe.drafter is not None
        reads = self._shapes.draft_reads(probe.drafter, probe.draft_budget)
        return self._shapes.draft_step(_contexts(probe), reads)


def _fit(
    samples: Sequence[tuple[StepShape, float]], prior: StepCost, profile: StepProfile | None
) -> StepCost:
    """With a profile, to what its departures leave of the times."""
    seconds = [
        t if profile is None else t - profile.departure(shape.num_rows) for shape, t in samples
    ]
    return fit_step_cost([shape for shape, _ in samples], seconds, prior)


def _draft_model_roofline(hardware: Hardware) -> StepCost:
    """Every rank runs all of it. Its K/V are counted in the target's bytes."""
    draft = hardware.draft_geometry
    if draft is None:
        return _NOTHING
    cost = roofline_cost(draft, hardware.device)
    share = draft.kv_bytes_per_token / hardware.geometry.kv_bytes_per_token
    return replace(cost, per_kv_byte=share * cost.per_kv_byte)


def _kv_alone(shape: StepShape) -> StepShape:
    """Of a copy: its time is put down to nothing else, or what a few small ones take would grow
    with the batch."""
    return StepShape(0, shape.kv_bytes, 0.0, 0)


def _contexts(probe: Probe) -> Floats:
    return np.full(probe.batch_size, float(probe.context_len))


def _verify_median(results: Sequence[StepResult]) -> float:
    return statistics.median_low(result.verify_seconds for result in results)
