"""`python -m magicdec.cluster.write_generated`: what is generated from the metric table, written.

Tests hold that the files are what would be written.
"""

import json
from pathlib import Path

import yaml

from magicdec.cluster.alerts import build_rules
from magicdec.cluster.dashboard import build_dashboard
from magicdec.cluster.metric_table import METRICS
from magicdec.cluster.metrics import table_of

_ROOT = Path(__file__).resolve().parents[1]
METRICS_PAGE = _ROOT / "docs" / "metrics.md"
_TABLE_MARK = "<!-- generated from cluster/metric_table.py -->\n"


def generated() -> dict[Path, str]:
    """Every file, and what belongs into it."""
    page = METRICS_PAGE.read_text(encoding="utf-8").partition(_TABLE_MARK)[0]
    rules = yaml.safe_dump(build_rules(), sort_keys=False, width=100)
    return {
        METRICS_PAGE: page + _TABLE_MARK + table_of(METRICS),
        _ROOT / "cluster" / "grafana" / "dashboard.json": json.dumps(build_dashboard(), indent=1)
        + "\n",
        _ROOT / "cluster" / "grafana" / "alerts.yaml": rules,
    }


def main() -> None:
    for path, text in generated().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
