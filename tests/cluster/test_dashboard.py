"""The dashboard and its queries: made of the metric table, and what Grafana takes."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from magicdec.cluster import metric_table as m
from magicdec.cluster.dashboard import ROWS, build_dashboard
from magicdec.cluster.promql import Selection
from magicdec.cluster.write_generated import generated

PROMTOOL = shutil.which("promtool")
EXPORTED = {metric.exported for metric in m.METRICS}
QUERIES = [query.expr for row in ROWS for panel in row.panels for query in panel.queries]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in build_dashboard()["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("path", generated(), ids=lambda path: Path(path).name)
def test_generated_files_are_as_they_would_be_written(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generated()[path], (
        "write it anew: python -m magicdec.cluster.write_generated"
    )


def test_every_query_names_metrics_of_the_table() -> None:
    for expr in QUERIES:
        named = set(re.findall(r"ray_[a-z0-9_]+", expr))
        bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
        assert named and bare <= EXPORTED, expr


def test_every_metric_but_a_few_is_on_a_panel() -> None:
    """What is not: vLLM's own names, for dashboards made for vLLM, and totals that others have."""
    text = " ".join(QUERIES)
    unseen = {metric for metric in m.METRICS if metric.exported not in text}
    assert unseen == {m.DRAFTS, m.DRAFT_TOKENS, m.ACCEPTED_PER_POS}


def test_a_query_cannot_name_a_label_or_a_kind_that_is_not_there() -> None:
    selection = Selection()
    with pytest.raises(ValueError, match="no label drafter"):
        selection.rate(m.STEP_SECONDS, "drafter")
    with pytest.raises(ValueError, match="no label"):
        selection.rate(m.ROUNDS, matchers={"position": "0"})
    with pytest.raises(ValueError, match="is a gauge"):
        selection.rate(m.KV_USAGE)
    with pytest.raises(ValueError, match="is a counter"):
        selection.quantile(m.ROUNDS, 0.5)


def test_panels_have_numbers_and_places_of_their_own() -> None:
    everything = build_dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in everything}
    assert len(places) == len(everything)
    for panel in panels():
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["description"] and panel["targets"]


def test_legends_name_labels_that_their_query_keeps() -> None:
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                for label in re.findall(r"{{(\w+)}}", query.legend):
                    assert re.search(rf"by \([^)]*\b{label}\b", query.expr), query


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH")
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = [
        {"record": f"panel:{i}", "expr": expr.replace("$__rate_interval", "1m")}
        for i, expr in enumerate(QUERIES)
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        [PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout


def test_the_dashboard_is_json() -> None:
    assert json.loads(json.dumps(build_dashboard())) == build_dashboard()
