"""How many drafted tokens will be accepted: hazards by drafter, budget, position and context.

A position is examined only where all drafts before it were accepted; where one was not, the rest of
the round is censored: it counts neither for nor against its cells. Counts fade with the rounds, and
go when the rounds stop agreeing with what was predicted.
"""

from collections.abc import Sequence

import numpy as np

from magicdec.acceptance.change_detection import ChangeDetector, likelihood_gains
from magicdec.acceptance.prior import (
    CELL_WEIGHT,
    AcceptanceAxes,
    AdditivePrior,
    Floats,
    context_bucket,
)
from magicdec.acceptance.records import AcceptanceSnapshot, Observation, counts_of, judged
from magicdec.acceptance.request_offsets import RequestOffsets

_HALF_LIFE = 64.0  # rounds until evidence counts half, and until half of a lost trust is back
_FLOOR = 8.0  # examined drafts that time alone leaves a cell: what is bad stays known as bad
_IDLE_ROUNDS = 4  # without a draft, after which the level is not known any more
_FORGET = 0.1  # of the trust in others, and of requests' offsets, that outlives a change
_REFIT_SHARE = 0.05  # of the evidence, new since the last fit
_REFIT_SWEEPS, _MERGE_SWEEPS = 2, 20
_LEAST_HAZARD = 0.003

# What a hopeful estimate adds, in logits: halved after _HOPE_WEIGHT examined drafts.
_DRAFTER_HOPE = 1.0  # for a drafter not seen lately
_CELL_HOPE = 0.5  # for a cell that was never examined
_REQUEST_HOPE = 2.0  # a unit of the variance of the request's offset
_HOPE_WEIGHT = 8.0


class AcceptanceModel:
    """Not thread-safe; one owner calls it.

    A hazard is (accepted + w * prior) / (examined + w) of its cell, the prior being what an
    additive logit model makes of the other cells, moved by the request's own offset.
    What cannot be is counted in `num_dropped` and changes nothing else.
    """

    def __init__(self, axes: AcceptanceAxes, half_life_rounds: float = _HALF_LIFE) -> None:
        self.axes = axes
        self.num_dropped = 0
        self.num_changes = 0  # times that evidence was given up because it no longer held
        self._fading = 0.5 ** (1.0 / half_life_rounds)
        # Each pair is examined and accepted drafts, AcceptanceAxes.shape.
        self._counts = (np.zeros(axes.shape), np.zeros(axes.shape))  # since the last restart
        self._seen = (np.zeros(axes.shape), np.zeros(axes.shape))  # whatever the level was
        self._others = (np.zeros(axes.shape), np.zeros(axes.shape))  # by other replicas
        self._trust = 1.0  # in the others' counts
        self._prior = AdditivePrior(axes)
        self._detector = ChangeDetector()
        self._num_tried = np.zeros((axes.shape[0], len(axes.drafters)))  # rows drafted lately
        self._drafter_of = np.arange(axes.num_settings) // len(axes.draft_budgets)
        families = np.array(axes.families)[self._drafter_of].tolist()
        self._requests = RequestOffsets(families, axes.max_draft_length)
        self._positions = np.arange(axes.max_draft_length)
        self._num_idle = 0  # rounds since the last draft
        self._num_unfaded = 0  # rounds whose fading is still to be done
        self._num_new = 0.0  # examined since the prior was fitted
        self._logits: dict[tuple[int, bool], Floats] = {}  # by bucket, hopeful; of these counts

    def observe(
        self,
        drafter: str,
        draft_budget: float,
        context_len: int,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        request_key: str | None = None,
    ) -> None:
        """One row's draft, outside of a round: nothing fades."""
        counts = (num_draft_tokens, num_accepted_tokens)
        row = Observation(drafter, draft_budget, context_len, *counts, request_key)
        self._learn(self._possible([row]))

    def observe_round(self, observations: Sequence[Observation], num_rounds: int = 1) -> None:
        """All decode rows of a round, or of several that drafted alike, in which earlier counts
        fade; not if none is possible."""
        rows = self._possible(observations)
        if not rows:
            return
        self._num_unfaded += num_rounds
        drafted = any(row.num_asked > 0 for row in rows)
        if drafted:
            self._fade()
            self._learn(rows)
        self._num_idle = 0 if drafted else self._num_idle + num_rounds

    def expected_tokens(
        self,
        drafter: str,
        draft_budget: float,
        context_len: int,
        draft_length: int,
        request_key: str | None = None,
    ) -> float:
        """Tokens that a round of one row emits: 1 + sum_j prod_{i<=j} h_i."""
        setting = self.axes.setting(drafter, draft_budget, context_len)
        survival = self.survival([context_len], [request_key or ""])[0, setting]
        return 1.0 + float(survival[:draft_length].sum())

    def survival(
        self, context_lens: Sequence[int], request_keys: Sequence[str], *, hopeful: bool = False
    ) -> Floats:
        """P(draft j is emitted): [num_rows, num_settings, max_draft_length].

        `request_keys` may be empty. Hopeful is as much better as may well turn out: the less was
        seen of a drafter, a cell or a request, the more, yet always below 1.
        """
        hazards = self._hazards(context_lens, request_keys, hopeful)
        return np.asarray(np.cumprod(hazards, axis=2))

    def num_rounds(self, request_key: str) -> int:
        """In which a draft of the request was judged; 0 for one that is not remembered."""
        return self._requests.num_rounds(request_key)

    def snapshot(self) -> AcceptanceSnapshot:
        """The counts that were observed here; merged ones are not handed on."""
        self._fade()
        return AcceptanceSnapshot.of(self.axes, *self._seen)

    def merge(self, others: AcceptanceSnapshot) -> None:
        """Takes what other replicas saw, in place of what was taken before.

        Drafters and positions that are not served here are left out.
        """
        self._fade()
        possible = [cell for cell in others.cells if cell.is_possible()]
        self.num_dropped += len(others.cells) - len(possible)
        self._others = counts_of(self.axes, possible)
        self._refit(_MERGE_SWEEPS)

    def _possible(self, rows: Sequence[Observation]) -> list[Observation]:
        possible = [row for row in rows if row.is_possible(self.axes)]
        self.num_dropped += len(rows) - len(possible)
        return possible

    def _learn(self, rows: Sequence[Observation]) -> None:
        drafted = [row for row in rows if row.num_asked > 0]
        if not drafted:
            return
        if self._num_idle >= _IDLE_ROUNDS and self._counts[0].any():
            self._restart()
        settings = [self.axes.setting(r.drafter, r.draft_budget, r.context_len) for r in drafted]
        buckets = [context_bucket(row.context_len) for row in drafted]
        examined, accepted = judged(drafted, len(self._positions))
        gains = self._gains(drafted, buckets, settings, examined, accepted)
        if self._detector.observe(gains):
            self.num_changes += 1
            self._restart()
        for new, counts, seen in zip((examined, accepted), self._counts, self._seen, strict=True):
            np.add.at(counts, (buckets, settings), new)
            np.add.at(seen, (buckets, settings), new)
        np.add.at(self._num_tried, (buckets, self._drafter_of[settings].tolist()), 1.0)
        self._requests.add(
            [row.request_key for row in drafted], settings, examined, accepted, gains
        )
        self._num_new += float(examined.sum())
        self._logits.clear()
        if self._num_new > _REFIT_SHARE * float(self._counts[0].sum()):
            self._refit(_REFIT_SWEEPS)
        self._follow_requests(rows)

    def _gains(
        self,
        rows: Sequence[Observation],
        buckets: list[int],
        settings: list[int],
        examined: Floats,
        accepted: Floats,
    ) -> Floats:
        hazards = self._hazards([r.context_len for r in rows], [r.request_key or "" for r in rows])
        predicted = hazards[np.arange(len(rows)), settings]  # [num_rows, num_positions]
        cells = (buckets, settings)
        counts = self._counts[0][cells] + self._trust * self._others[0][cells]
        return likelihood_gains(predicted, examined, accepted, counts / (counts + CELL_WEIGHT))

    def _follow_requests(self, rows: Sequence[Observation]) -> None:
        """Offsets of the rows' requests, drafted for or not, against the cells as they are now."""
        context_lens = {row.request_key: row.context_len for row in rows if row.request_key}
        if context_lens:
            logits, which = self._logits_of(list(context_lens.values()), False)
            self._requests.follow(list(context_lens), logits, which)

    def _fade(self) -> None:
        """By the rounds since the last time: many of them may have been plain."""
        if self._num_unfaded == 0:
            return
        fading = self._fading**self._num_unfaded
        for pair in (self._counts, self._seen, self._others):
            keep = np.where(pair[0] > _FLOOR, fading, 1.0)
            for counts in pair:
                counts *= keep
        self._prior.fade(1.0 - fading)
        self._num_tried *= fading
        self._trust = min(self._trust / fading, 1.0)
        self._logits.clear()
        self._num_unfaded = 0

    def _restart(self) -> None:
        """The level may have moved, which moves all cells alike until they show otherwise: they
        keep their differences as a prior, and the counts that tell the level go."""
        self._prior.restart()
        for counts in self._counts:
            counts[:] = 0.0
        self._trust *= _FORGET
        self._requests.forget(_FORGET)

    def _refit(self, sweeps: int) -> None:
        pairs = zip(self._counts, self._others, strict=True)
        examined, accepted = (own + self._trust * others for own, others in pairs)
        self._prior.fit(examined, accepted, sweeps)
        self._num_new = 0.0
        self._logits.clear()

    def _hazards(
        self, context_lens: Sequence[int], keys: Sequence[str], hopeful: bool = False
    ) -> Floats:
        """[num_rows, num_settings, num_positions]"""
        logits, which = self._logits_of(context_lens, hopeful)
        odds = np.exp(logits)[which]
        if keys:
            offsets, variances = self._requests.look_up(keys)
            if hopeful:
                offsets = offsets + _REQUEST_HOPE * variances
            odds *= np.exp(offsets)[:, :, None]
        return np.asarray(odds / (1.0 + odds))

    def _logits_of(self, context_lens: Sequence[int], hopeful: bool) -> tuple[Floats, list[int]]:
        """The rows' buckets, [num_buckets, num_settings, num_positions], and each row's in them."""
        self._fade()
        buckets = [context_bucket(context_len) for context_len in context_lens]
        found = sorted(set(buckets))
        logits = np.array([self._bucket_logits(bucket, hopeful) for bucket in found])
        return logits, [found.index(bucket) for bucket in buckets]

    def _bucket_logits(self, bucket: int, hopeful: bool) -> Floats:
        """Of the cells of one context bucket: [num_settings, num_positions]."""
        logits = self._logits.get((bucket, hopeful))
        if logits is None:
            pairs = zip(self._counts, self._others, strict=True)
            examined, accepted = (own[bucket] + self._trust * more[bucket] for own, more in pairs)
            hits = accepted + CELL_WEIGHT * self._prior.hazards[bucket]
            hazards = np.clip(hits / (examined + CELL_WEIGHT), _LEAST_HAZARD, 1.0 - _LEAST_HAZARD)
            logits = np.log(hazards / (1.0 - hazards))
            if hopeful:
                tried = self._num_tried[bucket][self._drafter_of][:, None]
                logits += _DRAFTER_HOPE * _HOPE_WEIGHT / (_HOPE_WEIGHT + tried)
                logits += _CELL_HOPE * _HOPE_WEIGHT / (_HOPE_WEIGHT + examined)
            self._logits[bucket, hopeful] = logits
        return logits
