"""The Grafana dashboard, from panels that name the metric table alone."""

from typing import Any

from magicdec.cluster.load_panels import LOAD, MEMORY, WAITING
from magicdec.cluster.metric_table import ROUNDS
from magicdec.cluster.panel import Panel, Row
from magicdec.cluster.speculation_panels import SPECULATION

UID = "magicdec"
TITLE = "MagicDec Serve"
ROWS = (SPECULATION, WAITING, MEMORY, LOAD)

_SCHEMA_VERSION = 39  # of Grafana 11; newer ones migrate it
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8  # Grafana's grid is 24 wide
_DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def build_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's API and its sidecar take it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        panels.append(_row(row, number=len(panels) + 1, top=top))
        top += 1
        for place, panel in enumerate(row.panels):
            x, y = place % _COLUMNS * _WIDTH, top + place // _COLUMNS * _HEIGHT
            panels.append(_panel(panel, number=len(panels) + 1, x=x, y=y))
        top += -(-len(row.panels) // _COLUMNS) * _HEIGHT
    return {
        "uid": UID,
        "title": TITLE,
        "tags": ["magicdec", "llm", "speculative-decoding"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_data_source_variable(), _model_variable()]},
        "panels": panels,
    }


def _row(row: Row, *, number: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": row.question,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
    }


def _panel(panel: Panel, *, number: int, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none"}
    custom = {"fillOpacity": 30 if panel.stacked else 0, "stacking": stacking}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATA_SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _DATA_SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def _data_source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
    }


def _model_variable() -> dict[str, Any]:
    return {
        "name": "model_name",
        "label": "Model",
        "type": "query",
        "datasource": _DATA_SOURCE,
        "query": f"label_values({ROUNDS.exported}, model_name)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {},
    }
