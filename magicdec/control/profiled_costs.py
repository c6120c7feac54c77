"""What a round costs by a profile of this machine, held to the rounds that it runs."""

from collections.abc import Mapping

import numpy as np

from magicdec.batch import Batch, StepResult
from magicdec.config import MAX_DRAFT_LENGTH, SpeculativeConfig
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_overhead import RoundOverhead
from magicdec.control.round_shapes import RoundShapes
from magicdec.control.step_bounds import Speeds, step_bounds, with_drafts
from magicdec.control.step_corrections import COMPUTE, EXTRA_ROWS, READ, StepCorrections
from magicdec.control.step_parts import StepParts
from magicdec.cost_model import VERIFY, Floats, StepShape, draft_kind
from magicdec.draft_choice import TRAITS
from magicdec.profiling.step_profile import PREFILL, StepProfile, begin_kind, observe_kind
from magicdec.roofline import ModelGeometry

_MOST_ROWS = MAX_DRAFT_LENGTH + 1  # of a sequence in a verify forward
_ANOTHER_LOAD = 1.25  # times the K/V, or other rows: what was learnt is less sure
DRAFT_KINDS = frozenset(draft_kind(drafter) for drafter in TRAITS)


class ProfiledRoundCosts:
    """Implements RoundCosts. One thread owns it.

    A round is draft_length draft steps and what begins them, then one verify forward: the decode
    rows, a prefill chunk beside them, and once in refresh_rounds the observation by which a
    drafter chooses its view again. `observe` feeds the correction of each kind.

    A machine that slows down slows all steps, and plain rounds show it while nothing is drafted.
    """

    def __init__(
        self, profile: StepProfile, geometry: ModelGeometry, config: SpeculativeConfig
    ) -> None:
        """Raises KeyError where the profile has no cost of VERIFY or PREFILL."""
        self._profile = profile
        for kind in (VERIFY, PREFILL):
            profile.model.cost(kind)
        self._shapes = RoundShapes(geometry, config)
        self._parts = StepParts(profile, self._shapes)
        self._refresh_rounds = config.selection.refresh_rounds
        self._kinds = frozenset(profile.model.costs)
        flaws = (EXTRA_ROWS, PREFILL, *sorted(self._kinds & DRAFT_KINDS))
        self._steps = StepCorrections(flaws)
        self._last_load = (0, 0.0)  # decode rows and their K/V bytes, as observed
        self.overhead = RoundOverhead()
        # Of the load that was asked about last, until a correction moves.
        self._load: RoundLoad | None = None
        self._contexts: Floats = np.empty(0)
        self._plain = StepShape(0, 0.0, 0.0, 0)
        self._forwards: list[float] = []  # seconds by draft length, as all lists here
        self._observed: dict[str, list[float]] = {}  # the same with the drafter's observation
        self._draft_steps: dict[float, StepShape] = {}  # by what a step reads
        self._curves: dict[tuple[str, float], list[float]] = {}

    @property
    def factors(self) -> dict[str, float]:
        """How much slower steps are now than profiled: see StepCorrections."""
        return self._steps.factors

    @property
    def observed_factors(self) -> dict[str, float]:
        """The same of the kinds that were observed here."""
        return self._steps.observed_factors

    def begin_at(self, factors: Mapping[str, float]) -> None:
        """What other replicas found, for the kinds that nothing was observed of here."""
        self._steps.begin_at(factors)
        self._load = None

    @property
    def num_dropped(self) -> int:
        """Times that were not finite and positive, or absurdly far from the prediction."""
        return self._steps.num_dropped

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        """See RoundCosts. Raises KeyError for a drafter that was not profiled, and IndexError above
        MAX_DRAFT_LENGTH. A load is weighed once, for all that is asked about it in a row."""
        if load is not self._load:
            self._weigh(load)
        if draft_length == 0:
            return self._forwards[0]
        curve = self._curves.get((drafter, draft_budget))
        return (self._curve(drafter, draft_budget) if curve is None else curve)[draft_length]

    def prefill_seconds(self, load: RoundLoad) -> float:
        """What the load's prefill chunks would take without its decode rows."""
        if load.num_prefill_rows == 0:
            return 0.0
        chunk = self._shapes.chunk(load.num_prefill_rows, load.prefill_products)
        return self._steps.factor(COMPUTE, PREFILL) * self._profile.added_seconds(0, chunk)

    def bounds(self, load: RoundLoad, draft_length: int) -> dict[str, float]:
        """Seconds of the round's verify forward by what they go to: see step_bounds.py."""
        if load is not self._load:
            self._weigh(load)
        chunk = self._shapes.chunk(load.num_prefill_rows, load.prefill_products)
        overhead = self.overhead.seconds(drafted=draft_length > 0)
        return step_bounds(
            self._profile.model.cost(VERIFY),
            self._profile.model.cost(PREFILL),
            with_drafts(self._plain, draft_length),
            chunk,
            Speeds(self._steps.factor(COMPUTE), self._steps.factor(READ), overhead),
        )

    def observe(self, batch: Batch, result: StepResult) -> None:
        """A step that ran and its times, each against what the profile says of just that step."""
        self._load = None
        self._steps.pass_round()
        drafts = self._parts.drafts(batch.sequences)
        if drafts is not None:
            kind, parts = drafts
            if any(seconds > 0.0 for seconds, _ in parts):  # somebody timed it
                self._steps.observe(kind, parts, result.draft_seconds)
        plain = self._parts.plain(batch)
        self._note_load(plain)
        forward = self._parts.forward(batch, result)
        greatest = max(forward, key=lambda part: part[0])[1]
        self._steps.observe(":".join(greatest), forward, result.verify_seconds)

    def _weigh(self, load: RoundLoad) -> None:
        """What does not depend on who drafts, nor over how much."""
        self._contexts = np.array(load.context_lens, dtype=np.float64)
        self._plain = self._shapes.rows(self._contexts)
        chunk = self._shapes.chunk(load.num_prefill_rows, load.prefill_products)
        num_rows = self._plain.num_rows
        read = self._profile.read_seconds(VERIFY, self._plain)
        compute, extra, prefill, reading = (
            self._steps.factor(*kinds)
            for kinds in ((COMPUTE,), (COMPUTE, EXTRA_ROWS), (COMPUTE, PREFILL), (READ,))
        )
        decode = [0.0] * _MOST_ROWS
        if num_rows > 0:
            decode = self._profile.seconds_by_rows(VERIFY, self._plain, _MOST_ROWS)
        plain = reading * read + compute * (decode[0] - read)
        self._forwards = [
            self.overhead.seconds(drafted=n > 1)
            + plain
            + extra * (seconds - decode[0])
            + prefill * self._profile.added_seconds(num_rows * n, chunk)
            for n, seconds in enumerate(decode, start=1)
        ]
        self._observed, self._draft_steps, self._curves = {}, {}, {}
        self._load = load

    def _curve(self, drafter: str, draft_budget: float) -> list[float]:
        reads = self._shapes.draft_reads(drafter, draft_budget)
        shape = self._draft_steps.get(reads)
        if shape is None:
            shape = self._draft_steps[reads] = self._shapes.draft_step(self._contexts, reads)
        kind = draft_kind(drafter)
        read = self._profile.read_seconds(kind, shape)
        compute, reading = (self._steps.factor(speed, kind) for speed in (COMPUTE, READ))
        step = compute * (self._profile.seconds(kind, shape) - read) + reading * read
        begin = compute * self._profile.known_seconds(begin_kind(drafter), shape)
        forwards = self._observed.get(drafter) or self._with_observation(drafter)
        curve = [begin + n * step + forward for n, forward in enumerate(forwards)]
        self._curves[drafter, draft_budget] = curve
        return curve

    def _with_observation(self, drafter: str) -> list[float]:
        """Verify forwards of rounds that this one drafts, on the mean of refresh_rounds."""
        forwards, kind = self._forwards, observe_kind(drafter)
        if kind in self._kinds:
            share = self._steps.factor(COMPUTE) / self._refresh_rounds
            looks = self._profile.seconds_by_rows(kind, self._plain, _MOST_ROWS)
            forwards = [a + share * b for a, b in zip(forwards, looks, strict=True)]
        self._observed[drafter] = forwards
        return forwards

    def _note_load(self, plain: StepShape) -> None:
        rows, num_bytes = self._last_load
        if plain.num_rows == 0:
            return
        grown = plain.kv_bytes > _ANOTHER_LOAD * num_bytes
        if plain.num_rows != rows or grown or _ANOTHER_LOAD * plain.kv_bytes < num_bytes:
            self._steps.expect_another_load()
            self._last_load = plain.num_rows, plain.kv_bytes
