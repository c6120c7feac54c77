"""What a round costs by a profile of this machine, held to the rounds that it runs."""

from collections.abc import Mapping, Sequence

import numpy as np

from magicdec.batch import Batch, ScheduledSequence, StepResult
from magicdec.config import MAX_DRAFT_LENGTH, OBSERVATION_WINDOW, SpeculativeConfig
from magicdec.control.cost_correction import CostCorrection
from magicdec.control.round_costs import RoundLoad
from magicdec.control.round_shapes import RoundShapes
from magicdec.control.step_corrections import EXTRA_ROWS, StepCorrections
from magicdec.cost_model import VERIFY, Floats, StepShape, draft_kind
from magicdec.draft_choice import TRAITS
from magicdec.profiling.step_profile import (
    PREFILL,
    StepProfile,
    begin_kind,
    observe_kind,
    prompt_kind,
)
from magicdec.roofline import ModelGeometry

_OVERHEAD_RATE = 0.1
_MAX_OVERHEAD = 1.0  # seconds: something else held the process up
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
        self._verify, self._prefill = profile.model.cost(VERIFY), profile.model.cost(PREFILL)
        self._shapes = RoundShapes(geometry, config)
        self._refresh_rounds = config.selection.refresh_rounds
        self._kinds = frozenset(profile.model.costs)
        self._steps = StepCorrections([kind for kind in self._kinds if kind in DRAFT_KINDS])
        self._chunks = CostCorrection()  # of PREFILL
        self._last_load = (0, 0.0)  # decode rows and their K/V bytes, as observed
        self._overhead = 0.0  # of a round beside its forwards
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
        """How much slower steps are now than profiled: as of StepCorrections, and PREFILL."""
        return {**self._steps.factors, PREFILL: self._chunks.factor}

    @property
    def observed_factors(self) -> dict[str, float]:
        """The same of the kinds that were observed here."""
        chunks = {PREFILL: self._chunks.factor} if self._chunks.num_observed > 0 else {}
        return self._steps.observed_factors | chunks

    def begin_at(self, factors: Mapping[str, float]) -> None:
        """What other replicas found, for the kinds that nothing was observed of here."""
        self._steps.begin_at(factors)
        if PREFILL in factors:
            self._chunks.begin_at(factors[PREFILL])
        self._load = None

    @property
    def num_dropped(self) -> int:
        """Times that were not finite and positive, or absurdly far from the prediction."""
        return self._steps.num_dropped + self._chunks.num_dropped

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
        chunk = self._shapes.chunk(load.num_prefill_rows, load.prefill_products)
        return self._chunks.factor * self._added(0, chunk)

    def observe_overhead(self, seconds: float) -> None:
        """What a round took beside its forwards. One that cannot be moves nothing."""
        if 0.0 <= seconds < _MAX_OVERHEAD:
            self._overhead += _OVERHEAD_RATE * (seconds - self._overhead)

    def observe(self, batch: Batch, result: StepResult) -> None:
        """A step that ran and its times, each against what the profile says of just that step."""
        self._load = None
        self._observe_drafts(batch.sequences, result.draft_seconds)
        chunks = [s for s in batch.sequences if not s.is_decode_row]
        rows = [
            (s, 1 + outcome.num_draft_tokens)
            for s, outcome in zip(batch.sequences, result.sequences, strict=True)
            if s.is_decode_row
        ]
        parts = [self._shapes.rows(_contexts([s]), num_rows) for s, num_rows in rows]
        products = float(sum(len(s.token_ids) * s.num_tokens for s in chunks))
        chunk = self._shapes.chunk(sum(len(s.token_ids) for s in chunks), products)
        decode = _sum(parts)
        plain = self._shapes.rows(_contexts([s for s, _ in rows]))
        plain_seconds = self._profile.seconds(VERIFY, plain) if rows else 0.0
        extra_seconds = self._profile.seconds(VERIFY, decode) - plain_seconds if rows else 0.0
        chunk_seconds = self._added(decode.num_rows, chunk)
        prompts = [self._prompt_seconds(s) for s in chunks if s.sampling is not None]
        observed = [seconds for seconds in prompts if seconds > 0.0]
        chunk_seconds += sum(observed)
        looks = [
            self._profile.known_seconds(observe_kind(s.draft.drafter), part)
            for (s, _), part in zip(rows, parts, strict=True)
            if s.draft is not None and s.draft_length > 0
        ]
        num_looking = sum(seconds > 0.0 for seconds in looks)
        if num_looking > 0:  # which of them did is not said
            plain_seconds += sum(looks) * (result.num_observed - len(observed)) / num_looking
        self._note_load(plain)
        self._correct(plain_seconds, extra_seconds, chunk_seconds, result.verify_seconds)

    def _weigh(self, load: RoundLoad) -> None:
        """What does not depend on who drafts, nor over how much."""
        self._contexts = np.array(load.context_lens, dtype=np.float64)
        self._plain = self._shapes.rows(self._contexts)
        chunk = self._shapes.chunk(load.num_prefill_rows, load.prefill_products)
        verify, prefill = self._steps.factor(VERIFY), self._chunks.factor
        rows = self._steps.factor(EXTRA_ROWS)
        num_rows = self._plain.num_rows
        decode = [0.0] * _MOST_ROWS
        if num_rows > 0:
            decode = self._profile.seconds_by_rows(VERIFY, self._plain, _MOST_ROWS)
        self._forwards = [
            self._overhead + verify * (decode[0] + rows * (seconds - decode[0]))
            for seconds in decode
        ]
        if chunk.num_rows > 0:
            self._forwards = [
                seconds + prefill * self._added(num_rows * n, chunk)
                for n, seconds in enumerate(self._forwards, start=1)
            ]
        self._observed, self._draft_steps, self._curves = {}, {}, {}
        self._load = load

    def _added(self, num_rows: int, chunk: StepShape) -> float:
        """What a chunk adds to a forward of so many decode rows; without any, all that it takes."""
        if chunk.num_rows == 0:
            return 0.0
        if num_rows == 0:
            return self._profile.seconds(PREFILL, chunk)
        linears = self._verify.per_row * num_rows
        together = linears + self._prefill.per_row * chunk.num_rows
        added = max(self._verify.weights, together) - max(self._verify.weights, linears)
        departure = self._profile.departure
        added += departure(num_rows + chunk.num_rows) - departure(num_rows)
        return max(added, 0.0) + self._prefill.per_row_product * chunk.row_products

    def _curve(self, drafter: str, draft_budget: float) -> list[float]:
        reads = self._shapes.draft_reads(drafter, draft_budget)
        shape = self._draft_steps.get(reads)
        if shape is None:
            shape = self._draft_steps[reads] = self._shapes.draft_step(self._contexts, reads)
        kind = draft_kind(drafter)
        step = self._profile.seconds(kind, shape)
        begin = self._profile.known_seconds(begin_kind(drafter), shape)
        factor = self._steps.factor(VERIFY) * self._steps.factor(kind)
        forwards = self._observed.get(drafter) or self._with_observation(drafter)
        curve = [factor * (begin + n * step) + forward for n, forward in enumerate(forwards)]
        self._curves[drafter, draft_budget] = curve
        return curve

    def _with_observation(self, drafter: str) -> list[float]:
        """Verify forwards of rounds that this one drafts, on the mean of refresh_rounds."""
        forwards, kind = self._forwards, observe_kind(drafter)
        if kind in self._kinds:
            share = self._steps.factor(VERIFY) / self._refresh_rounds
            looks = self._profile.seconds_by_rows(kind, self._plain, _MOST_ROWS)
            forwards = [a + share * b for a, b in zip(forwards, looks, strict=True)]
        self._observed[drafter] = forwards
        return forwards

    def _prompt_seconds(self, sequence: ScheduledSequence) -> float:
        """What a prompt's last chunk does for its drafter's first view; 0: it does nothing."""
        if sequence.draft is None:
            return 0.0
        num_rows = min(OBSERVATION_WINDOW, len(sequence.token_ids))
        shape = self._shapes.rows(np.array([float(sequence.num_tokens)]), num_rows)
        return self._profile.known_seconds(prompt_kind(sequence.draft.drafter), shape)

    def _observe_drafts(self, sequences: Sequence[ScheduledSequence], seconds: float) -> None:
        """Where several drafters drafted, the time says nothing of each."""
        drafting = [s for s in sequences if s.draft_length > 0 and s.draft is not None]
        names = {s.draft.drafter for s in drafting if s.draft is not None}
        kinds = {draft_kind(name) for name in names} & self._kinds
        if len(names) != 1 or not kinds:
            return
        drafter, kind = names.pop(), kinds.pop()
        budgets = [float(s.draft.draft_budget) for s in drafting if s.draft is not None]
        reads = np.array([self._shapes.draft_reads(drafter, budget) for budget in budgets])
        shape = self._shapes.rows(np.minimum(_contexts(drafting), reads))
        begin = self._profile.known_seconds(begin_kind(drafter), shape)
        num_steps = max(s.draft_length for s in drafting)
        predicted = begin + num_steps * self._profile.seconds(kind, shape)
        if predicted > 0.0:  # nobody timed it
            self._steps.observe_drafts(kind, predicted, seconds)

    def _note_load(self, plain: StepShape) -> None:
        rows, num_bytes = self._last_load
        if plain.num_rows == 0:
            return
        grown = plain.kv_bytes > _ANOTHER_LOAD * num_bytes
        if plain.num_rows != rows or grown or _ANOTHER_LOAD * plain.kv_bytes < num_bytes:
            self._steps.expect_another_load()
            self._last_load = plain.num_rows, plain.kv_bytes

    def _correct(
        self, plain_seconds: float, extra_seconds: float, chunk_seconds: float, measured: float
    ) -> None:
        """What a forward took beyond or below its prediction is put down to its greater part."""
        decode_seconds = plain_seconds + self._steps.factor(EXTRA_ROWS) * extra_seconds
        if chunk_seconds > decode_seconds:
            decode_seconds *= self._steps.factor(VERIFY)
            self._chunks.observe(chunk_seconds, measured - decode_seconds)
        elif decode_seconds > 0.0:
            left = measured - self._chunks.factor * chunk_seconds
            self._steps.observe_forward(plain_seconds, extra_seconds, left)


def _contexts(sequences: Sequence[ScheduledSequence]) -> Floats:
    return np.array([float(s.num_computed_tokens) for s in sequences])


def _sum(shapes: Sequence[StepShape]) -> StepShape:
    """Of parts of one forward."""
    return StepShape(
        sum(s.num_rows for s in shapes),
        sum(s.kv_bytes for s in shapes),
        sum(s.row_products for s in shapes),
        sum(s.num_sequences for s in shapes),
    )
