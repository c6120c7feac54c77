"""The panels about drafting: is it paying, where, and why not."""

from magicdec.cluster import metric_table as m
from magicdec.cluster.panel import Panel, Query, Row, line_panel
from magicdec.cluster.promql import Selection

_Q = Selection()
_DRAFTED = {"drafted": "[1-9][0-9]*"}
_TRIAL = {"decision": "trial"}


SPECULATION = Row(
    "Is speculation paying, where, and why not?",
    (
        line_panel(
            "Estimated speedup over plain decoding",
            "What plain decoding would have taken for the same tokens, by the cost model, over "
            "what the steps took. Below 1 drafts lose.",
            "none",
            _Q.share(m.PLAIN_SECONDS, m.FORESEEN_SECONDS),
            "speedup",
        ),
        line_panel(
            "Tokens a sequence and round",
            "Mean acceptance length, the recovered or bonus token included; 1 is plain decoding.",
            "none",
            f"1 + {_Q.rate(m.ACCEPTED_TOKENS, zero=True)} / {_Q.rate(m.ROWS)}",
            "tokens",
        ),
        line_panel(
            "Rounds by drafter and budget",
            "What the controller chose. none: plain decoding.",
            "ops",
            _Q.rate(m.ROUNDS, "drafter", "draft_budget"),
            "{{drafter}} over {{draft_budget}}",
            stacked=True,
        ),
        line_panel(
            "Sequences by draft length",
            "Tokens that were drafted for a sequence in a round.",
            "ops",
            _Q.rate(m.ROWS, "drafted"),
            "{{drafted}}",
            stacked=True,
        ),
        line_panel(
            "Share of sequences that draft, by context",
            "Where it pays by the controller's reckoning; contexts from so many tokens on.",
            "percentunit",
            f"{_Q.rate(m.ROWS, 'context', matchers=_DRAFTED)} / {_Q.rate(m.ROWS, 'context')}",
            "from {{context}}",
        ),
        line_panel(
            "Accepted by position in the draft",
            "Of drafts before which all were accepted: what the controller estimates.",
            "percentunit",
            _Q.share(m.ACCEPTED, m.EXAMINED, "position"),
            "{{position}}",
        ),
        line_panel(
            "Accepted by context",
            "The same by the length of the context: falling, the budget may be too small.",
            "percentunit",
            _Q.share(m.ACCEPTED, m.EXAMINED, "context"),
            "from {{context}}",
        ),
        line_panel(
            "Accepted by drafter",
            "Of all drafted tokens.",
            "percentunit",
            _Q.share(m.DRAFTER_ACCEPTED, m.DRAFTER_TOKENS, "drafter"),
            "{{drafter}}",
        ),
        line_panel(
            "What bounds the verify pass",
            "Drafts pay while kv is most of it; where compute is, their rows cost as much as they "
            "bring.",
            "percentunit",
            f"{_Q.rate(m.BOUND_SECONDS, 'bound')} / on () group_left () {_Q.rate(m.BOUND_SECONDS)}",
            "{{bound}}",
            stacked=True,
        ),
        line_panel(
            "Time by pass",
            "Draft steps and verify passes; the rest of a step is scheduling and text.",
            "percentunit",
            f"{_Q.rate(m.PASS_SECONDS, 'pass')} / on () group_left () {_Q.rate(m.STEP_SECONDS)}",
            "{{pass}}",
            stacked=True,
        ),
        line_panel(
            "KV positions read",
            "By draft steps in their views, and by verify passes in whole contexts.",
            "ops",
            _Q.rate(m.KV_READ, "pass"),
            "{{pass}}",
        ),
        Panel(
            "Foreseen and measured step time",
            "1 is a perfect forecast on the mean. The error is that of single steps.",
            "none",
            (
                Query(_Q.share(m.PREDICTED_SECONDS, m.FORESEEN_SECONDS), "foreseen / measured"),
                Query(_Q.share(m.FORECAST_ERROR, m.FORESEEN_SECONDS), "error"),
            ),
        ),
        line_panel(
            "Rounds to learn by",
            "Trials of other drafts. What they may lose is bounded by exploration_share.",
            "percentunit",
            f"{_Q.rate(m.ROUNDS, matchers=_TRIAL, zero=True)} / {_Q.rate(m.ROUNDS)}",
            "trials",
        ),
    ),
)
