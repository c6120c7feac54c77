"""Every alert, by promtool: told where it should be, and not where it should not."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from magicdec.cluster import metric_table as m
from magicdec.cluster.alerts import ALERTS, build_rules
from magicdec.cluster.metrics import Metric

PROMTOOL = shutil.which("promtool")
MODEL = 'model_name="m"'

Series = dict[str, str]  # series -> values, a minute apart


def rising(per_minute: float) -> str:
    return f"0+{per_minute:g}x60"


def constant(value: float) -> str:
    return f"{value:g}+0x60"


def series(metric: Metric, values: str, labels: str = "", suffix: str = "") -> Series:
    inside = ",".join(part for part in (MODEL, 'ReplicaId="r"', labels) if part)
    return {f"{metric.exported}{suffix}{{{inside}}}": values}


def two(metric: Metric, one: float, other: Metric, another: float, labels: str = "") -> Series:
    """Two counters, by what they gain a minute."""
    return series(metric, rising(one), labels) | series(other, rising(another), labels)


def queue_times(fast: float, slow: float) -> Series:
    buckets = {"1.0": fast, "60.0": fast, "120.0": fast + slow, "+Inf": fast + slow}
    return {
        name: values
        for le, count in buckets.items()
        for name, values in series(m.QUEUE_TIME, rising(count), f'le="{le}"', "_bucket").items()
    }


@dataclass(frozen=True)
class Case:
    fires: Series
    quiet: Series


CASES = {
    "MagicDecNoReplica": Case(
        series(m.LIVE_REPLICAS, constant(0)), series(m.LIVE_REPLICAS, constant(1))
    ),
    "MagicDecErrors": Case(
        series(m.ERRORS, rising(10), 'status="503"')
        | series(m.SUCCESSES, rising(90), 'finished_reason="stop"'),
        series(m.ERRORS, rising(50), 'status="400"')
        | series(m.SUCCESSES, rising(50), 'finished_reason="stop"'),
    ),
    "MagicDecRefusing": Case(
        series(m.DECISIONS, rising(3), 'decision="refused"'),
        series(m.DECISIONS, rising(3), 'decision="released"'),
    ),
    "MagicDecLongWait": Case(queue_times(50, 50), queue_times(100, 1)),
    "MagicDecPreempting": Case(
        two(m.PREEMPTIONS, 20, m.SUCCESSES, 100), two(m.PREEMPTIONS, 1, m.SUCCESSES, 100)
    ),
    "MagicDecKvPoolFull": Case(
        series(m.KV_USAGE, constant(0.99)), series(m.KV_USAGE, constant(0.9))
    ),
    "MagicDecSpeculationLoses": Case(
        two(m.PLAIN_SECONDS, 45, m.FORESEEN_SECONDS, 50),
        two(m.PLAIN_SECONDS, 60, m.FORESEEN_SECONDS, 50),
    ),
    "MagicDecForecastOff": Case(
        two(m.FORECAST_ERROR, 20, m.FORESEEN_SECONDS, 50),
        two(m.FORECAST_ERROR, 5, m.FORESEEN_SECONDS, 50),
    ),
    "MagicDecDraftsRejected": Case(
        two(m.ACCEPTED, 20, m.EXAMINED, 100, 'context="4096",position="0"'),
        two(m.ACCEPTED, 80, m.EXAMINED, 100, 'context="4096",position="0"')
        | two(m.ACCEPTED, 0, m.EXAMINED, 900, 'context="4096",position="3"'),
    ),
    "MagicDecPrefillStalls": Case(
        two(m.STALL_SECONDS, 40, m.STEP_SECONDS, 60), two(m.STALL_SECONDS, 20, m.STEP_SECONDS, 60)
    ),
    "MagicDecStreamsMove": Case(series(m.RESUMES, rising(1)), series(m.RESUMES, rising(0.2))),
    "MagicDecReportsDropped": Case(
        series(m.DECISIONS, rising(2), 'decision="dropped_report"'),
        series(m.DECISIONS, rising(2), 'decision="abandoned"'),
    ),
    "MagicDecTelemetryCostly": Case(
        two(m.TELEMETRY_SECONDS, 1, m.STEP_SECONDS, 50),
        two(m.TELEMETRY_SECONDS, 0.1, m.STEP_SECONDS, 50),
    ),
}


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == {alert.name for alert in ALERTS}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH")
def test_alerts_are_told_where_they_should_be(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(build_rules()))
    tests = []
    for alert in ALERTS:
        case = CASES[alert.name]
        labels = {"severity": alert.severity, "model_name": "m"}
        for given, alerts in ((case.fires, [labels]), (case.quiet, [])):
            inputs = [{"series": name, "values": values} for name, values in given.items()]
            told = [{"exp_labels": found} for found in alerts]
            tests.append((alert.name, inputs, told))
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": inputs,
                "promql_expr_test": [
                    {
                        "expr": f'ALERTS{{alertname="{name}", alertstate="firing"}}',
                        "eval_time": "45m",
                        "exp_samples": [
                            {
                                "labels": f'ALERTS{{alertname="{name}", alertstate="firing", '
                                + ", ".join(f'{k}="{v}"' for k, v in found["exp_labels"].items())
                                + "}",
                                "value": 1,
                            }
                            for found in told
                        ],
                    }
                ],
            }
            for name, inputs, told in tests
        ],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run([PROMTOOL, "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(tests) == 2 * len(ALERTS)
