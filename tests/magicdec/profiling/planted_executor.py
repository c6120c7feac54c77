"""An executor that computes nothing: its steps take planted times on a clock of its own.

It is as strict as the ranks are silent: a batch that the engine could not have scheduled fails.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from magicdec.batch import Batch, ScheduledSequence, SequenceResult, StepResult
from magicdec.config import OBSERVATION_WINDOW, EngineConfig, SchedulerConfig
from magicdec.cost_model import VERIFY, StepCost, StepShape, draft_kind
from magicdec.drafters.self_draft import POLICIES
from magicdec.profiling.device_rates import RankDevice
from magicdec.profiling.step_profile import PREFILL, begin_kind, observe_kind, prompt_kind
from magicdec.roofline import Device, ModelGeometry

# SmolLM2-135M on two cores, or nearly.
GEOMETRY = ModelGeometry(30, 576, 9, 3, 64, 1536, 49152, weight_element_bytes=4)
DEVICE = Device(12e9, 1.3e11, 1 << 34, 0.0)
_VERIFY = StepCost(3e-3, 40e-3, 2.3e-3, 1.2e-10, 6e-7, 1e-3)
_LOOK = StepCost(0.0, 0.0, 0.0, 1.5e-10, 8e-7, 0.0)
PLANTED: Mapping[str, StepCost] = {
    VERIFY: _VERIFY,
    PREFILL: StepCost(5e-3, 30e-3, 1.9e-3, 0.0, 5e-7, 0.0),
    **{draft_kind(name): StepCost(6e-3, 40e-3, 2.1e-3, 3e-10, 0.0, 6e-4) for name in POLICIES},
    **{begin_kind(name): StepCost(4e-3, 0.0, 0.0, 4e-10, 0.0, 0.0) for name in POLICIES},
    begin_kind("ngram"): StepCost(2e-5, 0.0, 0.0, 1e-12, 0.0, 0.0),
    prompt_kind("snapkv"): _LOOK,
    prompt_kind("recycled"): _LOOK,
    observe_kind("recycled"): _LOOK,
}


@dataclass
class PlantedExecutor:
    """Implements Executor. `noise` is the spread of log times, `stall_share` of steps take
    five times as long."""

    config: EngineConfig
    num_blocks: int
    max_model_len: int
    noise: float = 0.0
    stall_share: float = 0.0
    packs: bool = True
    now: float = 0.0
    num_steps: int = 0
    known: set[int] = field(default_factory=set)  # ids that a drafter may hold something of
    attention_backend: str = "planted"
    random: Random = field(default_factory=lambda: Random(0))
    rounds: Counter[int] = field(default_factory=Counter)  # since a view was chosen

    def clock(self) -> float:
        return self.now

    def measure_device(self) -> RankDevice:
        return RankDevice("planted", 2, 4, DEVICE)

    def shutdown(self) -> None:
        """Nothing to stop."""

    def execute(self, batch: Batch) -> StepResult:
        self._check(batch)
        self.num_steps += 1
        self.known -= set(batch.released)
        self.known |= {s.sequence_id for s in batch.sequences if s.draft is not None}
        draft, verify = self._draft_seconds(batch), self._verify_seconds(batch)
        looks = [s for s in batch.sequences if self._looks(s)]
        verify += sum(self._look_seconds(s) for s in looks)
        draft, verify = self._disturbed(draft), self._disturbed(verify)
        self.now += draft + verify
        results = tuple(SequenceResult((0,), (0,) * s.draft_length) for s in batch.sequences)
        return StepResult(results, draft, verify, len(looks))

    def _disturbed(self, seconds: float) -> float:
        stall = 5.0 if self.random.random() < self.stall_share else 1.0
        return seconds * stall * math.exp(self.random.gauss(0.0, self.noise))

    def _check(self, batch: Batch) -> None:
        scheduler: SchedulerConfig = self.config.scheduler
        sequences, size = batch.sequences, self.config.cache.block_size
        assert 1 <= len(sequences) <= scheduler.max_num_seqs
        rows = sum(len(s.token_ids) + s.draft_length for s in sequences)
        assert rows <= scheduler.max_batch_tokens
        pages = Counter(block for s in sequences for block in s.block_table.tolist())
        assert max(pages.values()) == 1, "a page is in two tables"
        assert min(pages) >= 0 and max(pages) < self.num_blocks, "no such page"
        ids = {s.sequence_id for s in sequences}
        assert len(ids) == len(sequences) and not ids & set(batch.released)
        for s in sequences:
            stop = s.num_tokens + s.draft_length
            assert stop <= min(self.max_model_len, len(s.block_table) * size)
            assert s.draft_length <= self.config.speculation.max_draft_length
            assert s.draft_length == 0 or s.is_decode_row
            assert s.draft is None or not s.draft.needs_history or s.history is not None

    def _draft_seconds(self, batch: Batch) -> float:
        drafting = [s for s in batch.sequences if s.draft_length > 0]
        if not drafting:
            return 0.0
        choices = [s.draft for s in drafting if s.draft is not None]
        (drafter,) = {choice.drafter for choice in choices}
        view = {True: choices[0].draft_budget, False: 1 << 60}[drafter in POLICIES]
        contexts = [min(s.num_computed_tokens, view) for s in drafting]
        shape = GEOMETRY.step_shape([1] * len(drafting), contexts)
        begin = PLANTED[begin_kind(drafter)].seconds(shape)
        if drafter == "ngram":
            return begin
        step = PLANTED[draft_kind(drafter)].seconds(shape) + self._packing(len(drafting))
        return begin + max(s.draft_length for s in drafting) * step

    def _verify_seconds(self, batch: Batch) -> float:
        """Decode rows and chunks share the linears, which read their weights or compute."""
        decode = [s for s in batch.sequences if s.is_decode_row]
        chunks = [s for s in batch.sequences if not s.is_decode_row]
        rows = [1 + s.draft_length for s in decode]
        num_rows = sum(len(s.token_ids) for s in chunks)
        products = sum(len(s.token_ids) * s.num_tokens for s in chunks)
        seconds = self._packing(sum(rows) + num_rows)
        verify, prefill = PLANTED[VERIFY], PLANTED[PREFILL]
        if not decode:
            return seconds + prefill.seconds(StepShape(num_rows, 0.0, products, 0))
        seconds += (
            verify.seconds(GEOMETRY.step_shape(rows, [s.num_computed_tokens for s in decode]))
            + prefill.per_row_product * products
        )
        alone = verify.per_row * sum(rows)
        together = max(verify.weights, alone + prefill.per_row * num_rows)
        return seconds + together - max(verify.weights, alone)

    def _packing(self, num_rows: int) -> float:
        """What a library loses on products of a few rows."""
        if not self.packs or num_rows < 4:
            return 0.0
        return 0.025 * math.exp(-((num_rows - 4) / 20.0))

    def _looks(self, s: ScheduledSequence) -> bool:
        policy = None if s.draft is None else POLICIES.get(s.draft.drafter)
        if policy is None or s.sampling is None:
            return False
        if not s.is_decode_row:
            return policy.observes_prompt
        if not policy.observes_rounds or s.draft_length == 0:
            return False
        self.rounds[s.sequence_id] += 1
        every = self.config.speculation.selection.refresh_rounds
        return self.rounds[s.sequence_id] % every == 1 % every

    def _look_seconds(self, s: ScheduledSequence) -> float:
        """Of a prompt's chunk its last rows are observed alone."""
        if s.is_decode_row:
            rows, context = 1 + s.draft_length, s.num_computed_tokens
        else:
            rows, context = min(OBSERVATION_WINDOW, len(s.token_ids)), s.num_tokens
        return _LOOK.seconds(GEOMETRY.step_shape([rows], [context]))
