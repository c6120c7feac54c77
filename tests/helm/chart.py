"""The chart as Helm renders it, and its objects."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "magicdec"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))

Object = dict[str, Any]
Values = dict[str, Any]


class Refused(Exception):
    """Helm did not render: the message is what a person reads."""


@dataclass(frozen=True)
class Release:
    objects: list[Object]
    notes: str

    def of_kind(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    @property
    def service(self) -> Object:
        (found,) = self.of_kind("RayService")
        return found

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        return config

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.serve_config["applications"][0]["args"]
        return arguments

    def pod_templates(self) -> Iterator[Object]:
        """Of the service's cluster and the job's."""
        clusters = [found["spec"]["rayClusterConfig"] for found in self.of_kind("RayService")]
        clusters += [found["spec"]["rayClusterSpec"] for found in self.of_kind("RayJob")]
        for cluster in clusters:
            yield cluster["headGroupSpec"]["template"]
            yield from (group["template"] for group in cluster["workerGroupSpecs"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Helm's library writes to the process's own stderr that it follows links."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@cache
def _chart() -> Any:
    with _quiet():
        return helm_python.Chart.load(str(CHART))


def render(values: Values | None = None, name: str = "demo") -> Release:
    """Raises Refused by the schema or by a `fail`."""
    try:
        with _quiet():
            files = _chart().render(values=values or {}, name=name)
    except helm_python.HelmError as error:
        raise Refused(str(error)) from error
    notes, objects = "", []
    for path, text in files.items():
        if path.endswith("NOTES.txt"):
            notes = text
        else:
            objects += [found for found in yaml.safe_load_all(text) if found]
    return Release(objects, notes)


def example(path: Path) -> Values:
    values: Values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def lint() -> dict[str, Any]:
    with _quiet():
        found: dict[str, Any] = helm_python.lint(str(CHART))
    return found
