"""Prometheus alert rules, over the metric table alone."""

from dataclasses import dataclass
from typing import Any

from magicdec.cluster import metric_table as m
from magicdec.cluster.promql import Selection

GROUP = "magicdec"
_CRITICAL, _WARNING, _INFO = "critical", "warning", "info"
_Q = Selection(selector="", interval="10m")
_MODEL = "model_name"
_SERVER_ERRORS = {"status": "5.."}
_REFUSED = {"decision": "refused"}
_DROPPED = {"decision": "dropped_.*"}
_FIRST = {"position": "0"}


@dataclass(frozen=True, slots=True)
class Alert:
    """`lasts`: for how long the expression holds before anybody is told."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str
    action: str


ALERTS = (
    Alert(
        "MagicDecNoReplica",
        f"{_Q.gauge(m.LIVE_REPLICAS, _MODEL)} == 0",
        "2m",
        _CRITICAL,
        "No replica of {{ $labels.model_name }} reports to the router.",
        "Look at the EngineReplica deployment's status and its pods' logs.",
    ),
    Alert(
        "MagicDecErrors",
        f"{_Q.rate(m.ERRORS, _MODEL, matchers=_SERVER_ERRORS)} / ("
        f"{_Q.rate(m.ERRORS, _MODEL)} + "
        f"({_Q.rate(m.SUCCESSES, _MODEL)} or 0 * {_Q.rate(m.ERRORS, _MODEL)})) > 0.05",
        "5m",
        _CRITICAL,
        "{{ $value | humanizePercentage }} of the requests of {{ $labels.model_name }} fail.",
        "Replicas die, or none takes requests: look at the logs of the ingress.",
    ),
    Alert(
        "MagicDecRefusing",
        f"{_Q.rate(m.DECISIONS, _MODEL, matchers=_REFUSED)} > 0",
        "5m",
        _WARNING,
        "The queue of {{ $labels.model_name }} is full: clients are told 429.",
        "Add replicas, or raise server.max_queued_requests where clients can wait.",
    ),
    Alert(
        "MagicDecLongWait",
        f"{_Q.quantile(m.QUEUE_TIME, 0.95, _MODEL)} > 60",
        "10m",
        _WARNING,
        "Of {{ $labels.model_name }}, one request in twenty waits over a minute for a replica.",
        "Add replicas. Waiting by context length: the dashboard's second row.",
    ),
    Alert(
        "MagicDecPreempting",
        f"{_Q.rate(m.PREEMPTIONS, _MODEL)} / {_Q.rate(m.SUCCESSES, _MODEL)} > 0.1",
        "10m",
        _WARNING,
        "Sequences of {{ $labels.model_name }} lose their KV blocks and begin again.",
        "Raise cache.kv_cache_gib, or lower scheduler.max_num_seqs.",
    ),
    Alert(
        "MagicDecKvPoolFull",
        f"{_Q.mean(m.KV_USAGE, _MODEL)} > 0.95",
        "15m",
        _WARNING,
        "The KV pools of {{ $labels.model_name }} are full.",
        "Add replicas, or raise cache.kv_cache_gib.",
    ),
    Alert(
        "MagicDecSpeculationLoses",
        f"{_Q.share(m.PLAIN_SECONDS, m.FORESEEN_SECONDS, _MODEL)} < 0.97",
        "15m",
        _WARNING,
        "{{ $labels.model_name }} decodes at {{ $value | humanize }} of plain decoding's speed.",
        "Step times may be foreseen wrongly: see MagicDecForecastOff. Requests that wish for "
        "drafts of their own count too. draft_length: 0 turns drafts off.",
    ),
    Alert(
        "MagicDecForecastOff",
        f"{_Q.share(m.FORECAST_ERROR, m.FORESEEN_SECONDS, _MODEL)} > 0.3",
        "15m",
        _WARNING,
        "Step times of {{ $labels.model_name }} are foreseen {{ $value | humanizePercentage }} "
        "off: drafts are chosen by them.",
        "Something else may be running on the machine, or the profile is of another one.",
    ),
    Alert(
        "MagicDecDraftsRejected",
        f"{_Q.rate(m.ACCEPTED, _MODEL, matchers=_FIRST)} / "
        f"{_Q.rate(m.EXAMINED, _MODEL, matchers=_FIRST)} < 0.3",
        "15m",
        _INFO,
        "Of {{ $labels.model_name }}, fewer than a third of first drafts are accepted.",
        "The text may suit another drafter: speculation.drafters says among whom rounds choose.",
    ),
    Alert(
        "MagicDecPrefillStalls",
        f"{_Q.share(m.STALL_SECONDS, m.STEP_SECONDS, _MODEL)} > 0.5",
        "15m",
        _WARNING,
        "Prompts take half of the time of those whose answers {{ $labels.model_name }} writes.",
        "Lower speculation.inter_token_target_s, or add replicas.",
    ),
    Alert(
        "MagicDecStreamsMove",
        f"{_Q.rate(m.RESUMES, _MODEL)} * 600 > 5",
        "0m",
        _WARNING,
        "Streams of {{ $labels.model_name }} had to go on at other replicas.",
        "Replicas die or are evicted: look at pod restarts and at memory.",
    ),
    Alert(
        "MagicDecReportsDropped",
        f"{_Q.rate(m.DECISIONS, _MODEL, matchers=_DROPPED)} > 0",
        "5m",
        _WARNING,
        "Replicas of {{ $labels.model_name }} report what cannot be true.",
        "The router's log names the field.",
    ),
    Alert(
        "MagicDecTelemetryCostly",
        f"{_Q.share(m.TELEMETRY_SECONDS, m.STEP_SECONDS, _MODEL)} > 0.01",
        "15m",
        _INFO,
        "Counting takes more than 1 % of the steps' time of {{ $labels.model_name }}.",
        "Steps of microseconds, or a processor that is overloaded.",
    ),
)


def build_rules() -> dict[str, Any]:
    """The groups of a rules file, and of a PrometheusRule's spec."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "action": alert.action},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": GROUP, "rules": rules}]}
