"""`python -m tests.helm.write_chart_files`: the chart's README and schema, written."""

from tests.helm.chart import CHART
from tests.helm.values_schema import schema_text
from tests.helm.values_table import readme

if __name__ == "__main__":
    (CHART / "README.md").write_text(readme(), encoding="utf-8")
    (CHART / "values.schema.json").write_text(schema_text(), encoding="utf-8")
