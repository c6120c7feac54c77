"""What a simulated replica's next rounds compute, and what they take."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from magicdec.config import OBSERVATION_WINDOW, ConfigError, check_at_least
from magicdec.control.draft_length import ControllerConfig
from magicdec.control.round_costs import RoundCosts, RoundLoad
from magicdec.prefill_shares import prefill_shares
from magicdec.simulation.drafting import Drafting
from magicdec.simulation.jobs import Job, answer_paths
from magicdec.simulation.queues import Queues
from magicdec.simulation.round_seconds import most_rows_within, round_seconds

_MAX_GROWTH = 1 / 8  # of the context read, within rounds that are taken as one
_MOST_ALIKE = 128
_MAX_VIEW_SHARE = ControllerConfig().max_view_share


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The limits of a replica, as the settings of the same names."""

    total_kv_tokens: int
    max_num_seqs: int = 16
    max_batch_tokens: int = 512
    inter_token_target_s: float = 1.0  # prefill beside decode rows ends a round about there

    def __post_init__(self) -> None:
        check_at_least("total_kv_tokens", self.total_kv_tokens, 1)
        check_at_least("max_num_seqs", self.max_num_seqs, 1)
        least = self.max_num_seqs + OBSERVATION_WINDOW
        check_at_least("max_batch_tokens", self.max_batch_tokens, least)
        if not self.inter_token_target_s > 0.0:
            raise ConfigError(
                f"inter_token_target_s must be above 0, got {self.inter_token_target_s}"
            )


@dataclass(slots=True)
class Rounds:
    """Alike, one after the other, from `start_s` on; one alone where it has prefill chunks.

    `paths` are the output tokens of each row before them, after one, after two and so on.
    """

    start_s: float
    num_rounds: int
    seconds: float  # of each
    decode_seconds: float  # of each, without its chunks
    chunks: Sequence[tuple[Job, int]]
    rows: Sequence[Job]
    draft_lengths: Sequence[int]
    paths: Sequence[Sequence[int]]

    @property
    def end_s(self) -> float:
        return self.start_s + self.num_rounds * self.seconds


class StepPlanner:
    """Asks who drafts how far, and makes rounds of it."""

    def __init__(self, shape: EngineShape, costs: RoundCosts, drafting: Drafting) -> None:
        self._shape = shape
        self._costs = costs
        self._drafting = drafting

    def plan(self, queues: Queues, now: float) -> Rounds:
        rows = tuple(queues.decoding)
        num_rows = self._shape.max_batch_tokens - len(rows)
        chunks = _chunks(queues.prefilling, num_rows)
        load = _load(rows, chunks)
        if not rows:
            seconds = self._costs.seconds(load, *_ANYONE)
            return Rounds(now, 1, seconds, 0.0, chunks, (), (), ())
        choice = self._drafting.choose(load)
        lengths = self._draft_lengths(load, choice.draft_length, choice.plan.draft_budget, queues)

        def seconds_of(load: RoundLoad) -> float:
            return round_seconds(self._costs, load, choice.plan, lengths)

        if chunks:
            most = num_rows - sum(lengths)
            if most < load.num_prefill_rows:
                chunks = _chunks(queues.prefilling, most)
                load = _with_chunks(load, chunks)
            seconds = seconds_of(load)
            if seconds > self._shape.inter_token_target_s:
                chunks, seconds = self._shrink(queues.prefilling, load, seconds_of)
            _, paths = answer_paths(rows, lengths, 1)
            decode_seconds = seconds_of(_with_chunks(load, ()))
            return Rounds(now, 1, seconds, decode_seconds, chunks, rows, lengths, paths)
        num_rounds, paths = answer_paths(rows, lengths, self._num_alike(load, lengths, queues))
        if num_rounds > 1:
            half = num_rounds // 2
            grown = (path[half] - path[0] for path in paths)
            middle = tuple(map(sum, zip(load.context_lens, grown, strict=True)))
            load = replace(load, context_lens=middle)
        seconds = seconds_of(load)
        return Rounds(now, num_rounds, seconds, seconds, (), rows, lengths, paths)

    def _draft_lengths(
        self,
        load: RoundLoad,
        wished: Callable[[str], int],
        draft_budget: float,
        queues: Queues,
    ) -> tuple[int, ...]:
        """As the scheduler takes them: within the answer's limit, the free tokens, the rows of the
        step (a quarter is kept for prompts), and over a view that is not too much of the context.
        """
        num_rows = len(load.context_lens)
        budget = self._shape.max_batch_tokens
        if queues.prefilling:
            budget -= max(budget // 4, OBSERVATION_WINDOW)
        most = max(min(budget, queues.num_free) // num_rows - 1, 0)
        least_context = draft_budget / _MAX_VIEW_SHARE
        return tuple(
            min(wished(key), limit, most) if context_len >= least_context else 0
            for key, limit, context_len in zip(
                load.request_keys, load.draft_limits, load.context_lens, strict=True
            )
        )

    def _shrink(
        self, prefilling: Sequence[Job], load: RoundLoad, seconds_of: Callable[[RoundLoad], float]
    ) -> tuple[list[tuple[Job, int]], float]:
        """Chunks with which the round is within the target, if it can be, and its seconds."""

        def tried(num_rows: int) -> tuple[list[tuple[Job, int]], float]:
            chunks = _chunks(prefilling, num_rows)
            return chunks, seconds_of(_with_chunks(load, chunks))

        target_s = self._shape.inter_token_target_s
        return tried(most_rows_within(lambda n: tried(n)[1], load.num_prefill_rows, target_s))

    def _num_alike(self, load: RoundLoad, draft_lengths: Sequence[int], queues: Queues) -> int:
        """Rounds until the choice, the pool or the growth of the context may end them."""
        growth = len(draft_lengths) + sum(draft_lengths)  # at most
        to_grown = math.floor(sum(load.context_lens) * _MAX_GROWTH / growth)
        to_full = queues.num_free // growth
        return int(max(min(to_grown, to_full, self._drafting.most_rounds, _MOST_ALIKE), 1))


_ANYONE = ("recycled", 0, 512)  # a plain step costs the same, whoever is named


def _chunks(prefilling: Sequence[Job], num_rows: int) -> list[tuple[Job, int]]:
    shares = prefill_shares([job.num_left for job in prefilling], num_rows)
    return [(job, share) for job, share in zip(prefilling, shares, strict=True) if share > 0]


def _load(rows: Sequence[Job], chunks: Sequence[tuple[Job, int]]) -> RoundLoad:
    load = RoundLoad(
        context_lens=tuple(job.num_context_tokens for job in rows),
        request_keys=tuple(job.request_id for job in rows),
        draft_limits=tuple(job.trace.max_tokens - job.emitted - 1 for job in rows),
    )
    return _with_chunks(load, chunks)


def _with_chunks(load: RoundLoad, chunks: Sequence[tuple[Job, int]]) -> RoundLoad:
    """Of those decode rows, and these chunks."""
    products = 0.0
    for job, share in chunks:
        products += share * (job.num_context_tokens - job.num_left + share)
    num_rows = sum(share for _, share in chunks)
    return replace(load, num_prefill_rows=num_rows, prefill_products=products)
