"""values.yaml with its comments: what the chart's README and schema are made of."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from tests.helm.chart import CHART

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w-]+):(?: (?P<value>.*))?$")
_COMMENT = "# -- "
_STEP = 2


@dataclass(frozen=True)
class Value:
    """One that can be set: `default` as the file writes it."""

    path: tuple[str, ...]
    default: str
    text: str


def documented_values() -> list[Value]:
    """Every leaf, in the file's order; a mapping with a comment of its own is one."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    found: list[Value] = []
    path: list[str] = []
    comment, inside = "", -1
    for line in text.splitlines():
        if line.strip().startswith(_COMMENT):
            comment = line.strip().removeprefix(_COMMENT)
            continue
        match = _KEY.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // _STEP
        if inside >= 0 and depth > inside:
            continue  # of a mapping that is documented as a whole
        inside = -1
        path = [*path[:depth], match["key"]]
        if match["value"] is None and not comment:
            continue  # a section
        if match["value"] is None:
            inside = depth
            value: Any = yaml.safe_load(text)
            for key in path:
                value = value[key]
            default = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
        else:
            default = match["value"]
        found.append(Value(tuple(path), default, comment))
        comment = ""
    return found


def readme() -> str:
    """helm/magicdec/README.md."""
    intro = (CHART / "README.md").read_text(encoding="utf-8").partition("## Values\n")[0]
    lines = ["| Value | Default | What it is |", "| --- | --- | --- |"]
    for value in documented_values():
        lines.append(f"| `{'.'.join(value.path)}` | `{value.default}` | {value.text} |")
    return intro + "## Values\n\n" + "\n".join(lines) + "\n"
