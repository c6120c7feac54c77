"""Draft lengths of single requests, where their own acceptance differs enough to pay.

Two ways to draft less than the plan says. *Split*: requests far behind the others draft nothing,
which saves their part of the draft steps too. *Trim*: a request stops where its next draft would
yield less than its verify row takes; its draft steps run on beside the others' and save nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from magicdec.control.round_costs import RoundCostTable
from magicdec.control.round_forecast import Forecast, emitted_tokens

_LEAST_GAP = 0.5  # drafted tokens expected of two rows; less does not part them


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice for a round, and what it is expected to bring."""

    setting: int
    draft_length: int
    tokens: float
    seconds: float
    row_lengths: Mapping[int, int] = field(default_factory=dict)  # rows that differ

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def split_rows(forecast: Forecast, best: Candidate, costs: RoundCostTable) -> Candidate | None:
    """Drafts for the rows ahead of the widest gap alone; None where there is none.

    The gap is sought under the best setting for all. Their cost is that of the plain round and of
    what drafting for them adds to it.
    """
    reach = forecast.survival[:, best.setting].sum(axis=1)  # [num_rows] tokens at most
    order = np.argsort(-reach, kind="stable")
    ranked = reach[order]
    gaps = ranked[:-1] - ranked[1:]
    if not len(gaps) or gaps.max() < _LEAST_GAP:
        return None
    num_ahead = int(np.argmax(gaps)) + 1
    ahead = sorted(int(row) for row in order[:num_ahead])
    behind = [int(row) for row in order[num_ahead:]]
    tokens = emitted_tokens(forecast.survival[ahead]) + len(behind)
    setting = int(np.argmax((tokens / forecast.seconds)[:, 1:].max(axis=1)))
    alone = costs.curve(forecast.load.drafting(ahead), setting)
    if not math.isfinite(alone[0]):
        return None  # what drafting adds to it cannot be told
    seconds = forecast.seconds[0, 0] + alone - alone[0]  # [max_draft_length + 1]
    length = 1 + int(np.argmax((tokens[setting] / seconds)[1:]))
    return Candidate(
        setting,
        length,
        float(tokens[setting, length]),
        float(seconds[length]),
        {row: 0 for row in behind},
    )


def trim_rows(forecast: Forecast, chosen: Candidate, costs: RoundCostTable) -> Candidate:
    """The same with every row cut where its next draft yields less than the verify row takes."""
    load, length = forecast.load, chosen.draft_length
    num_rows = len(load.context_lens)
    plain = float(forecast.seconds[0, 0])
    wider = costs.plain(load.with_rows(num_rows, sum(load.context_lens)))
    row_seconds = max(wider - plain, 0.0) / num_rows
    survival = forecast.survival[:, chosen.setting, :length]
    useful = (survival > row_seconds * chosen.rate).sum(axis=1)  # [num_rows]; survival only falls
    lengths = dict(chosen.row_lengths)
    tokens, seconds = chosen.tokens, chosen.seconds
    for row in np.flatnonzero(useful < length).tolist():
        if row not in lengths:
            lengths[row] = int(useful[row])
            tokens -= float(survival[row, lengths[row] :].sum())
            seconds -= row_seconds * (length - lengths[row])
    return Candidate(chosen.setting, length, tokens, seconds, lengths)
