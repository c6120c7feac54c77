"""Verify passes over a plain stream, judged at every position (T6, T7 and the bf16 tie rule).

The draft proposes what the plain stream says, so a verify pass sees that stream's prefix in every
row; whatever the row chooses is noted, and the stream goes on as it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from magicdec.attention import AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.control.round_policy import FixedPolicy
from magicdec.drafters.rank_drafters import RankDrafters
from magicdec.drafts import Draft
from magicdec.engine import Engine
from magicdec.kernels.gumbel import gumbel_noise, random_words
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.types import Request, RequestOutput
from magicdec.verification import Meanwhile
from tests.generation import run

_BF16_FRACTION_BITS = 7

Streams = dict[int, list[int]]
"""Seed -> prompt and plain output: seeds name the requests, greedy ones too."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A row of a verify pass that chose another token than plain decoding did there."""

    seed: int
    position: int
    gap: float  # of the two tokens' scores plus noise, in the verify pass
    threshold_gap: float  # of one of the two to its top-k, top-p or min-p threshold; inf: none
    bf16_step: float  # between neighbouring bf16 numbers at the row's largest logit, as a score

    @property
    def num_steps(self) -> float:
        """The smaller gap, in steps."""
        return min(abs(self.gap), self.threshold_gap) / self.bf16_step


@dataclass(slots=True)
class Verdict:
    num_positions: int = 0
    divergences: list[Divergence] = field(default_factory=list)


class ReplayDrafter:
    """Proposes the plain stream itself."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def propose(self, sequences: list[ScheduledSequence]) -> list[tuple[Proposal, ...]]:
        drafts = []
        for sequence in sequences:
            assert sequence.sampling is not None
            start = sequence.num_tokens
            stream = self._streams[sequence.sampling.seed]
            drafts.append(
                tuple(Proposal(token) for token in stream[start : start + sequence.draft_length])
            )
        return drafts

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        return None

    def release(self, sequence_ids: Sequence[int]) -> None: ...


class TeacherForced:
    """A verification rule that samples every row, notes it, and emits the plain stream."""

    def __init__(self, sampler: Sampler, streams: Streams) -> None:
        self._sampler = sampler
        self._streams = streams
        self.verdict = Verdict()

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        raise AssertionError("the stream itself is the draft")

    def only_scales(self, rows: list[SamplerRow]) -> bool:
        raise AssertionError("the stream itself is the draft")

    def verify(
        self,
        logits: torch.Tensor,
        rows: list[SamplerRow],
        drafts: Sequence[Draft],
        meanwhile: Meanwhile | None = None,
    ) -> list[tuple[int, ...]]:
        """What is chosen is not what is emitted, so nothing can begin meanwhile."""
        chosen = self._sampler.sample(logits, rows)
        for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            plain = self._streams[row.sampling.seed][row.position]
            self.verdict.num_positions += 1
            if token != plain:
                self.verdict.divergences.append(self._divergence(logits[i], row, token, plain))
        emitted, start = [], 0
        for draft in drafts:
            last = rows[start + len(draft)]
            bonus = self._streams[last.sampling.seed][last.position]
            emitted.append((*(p.token_id for p in draft), bonus))
            start += len(draft) + 1
        return emitted

    def _divergence(
        self, logits: torch.Tensor, row: SamplerRow, token: int, plain: int
    ) -> Divergence:
        scores = self._sampler.process(logits.float().cpu(), row).numpy().astype(np.float64)
        noise = np.zeros(len(scores))
        if row.sampling.temperature > 0.0:
            noise = gumbel_noise(random_words(row.sampling.seed, row.position, len(scores)))
        unmasked = replace(row.sampling, top_k=0, top_p=1.0, min_p=0.0)
        whole = self._sampler.process(logits.float().cpu(), replace(row, sampling=unmasked)).numpy()
        threshold_gap = float("inf")
        if np.isneginf(scores).any():
            threshold = whole[np.isfinite(scores)].min()  # of top-k and top-p: the last one kept
            if row.sampling.min_p > 0.0:
                threshold = whole.max() + np.log(row.sampling.min_p)
            threshold_gap = float(min(abs(whole[t] - threshold) for t in (token, plain)))
        gap = float((scores + noise)[token] - (scores + noise)[plain])
        largest = float(logits.float().abs().max())
        step = 2.0 ** (math.floor(math.log2(largest)) - _BF16_FRACTION_BITS)
        step /= row.sampling.temperature or 1.0
        return Divergence(row.sampling.seed, row.position, gap, threshold_gap, step)


def plain_streams(engine: Engine, requests: list[Request]) -> Streams:
    """Decodes the requests plainly, and gives each its whole stream by its seed."""
    plan = FixedPolicy.of(engine.config.speculation).plan
    engine.policy = FixedPolicy(replace(plan, draft_length=0))
    outputs: dict[str, list[RequestOutput]] = run(engine, requests)
    return {
        r.sampling.seed: [
            *r.prompt_token_ids,
            *(token for output in outputs[r.request_id] for token in output.token_ids),
        ]
        for r in requests
    }


def replay(engine: Engine, requests: list[Request], streams: Streams, sampler: Sampler) -> Verdict:
    """Verifies the streams with drafts of the engine's plan; the engine is of no other use then."""
    rule = TeacherForced(sampler, streams)
    runner = engine._executor._runner  # type: ignore[attr-defined]
    runner._rule = rule
    runner._drafters = RankDrafters({"streaming": ReplayDrafter(streams)}, torch.device("cpu"))
    run(engine, requests)
    return rule.verdict
