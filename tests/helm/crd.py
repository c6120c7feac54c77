"""KubeRay's CRDs as JSON schemas, stricter than the API server: an unknown key is an error."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.helm.chart import ROOT

KUBERAY = ROOT.parent / "shared" / "kuberay"
PLURALS = {"RayService": "rayservices", "RayJob": "rayjobs"}

Schema = dict[str, Any]


@cache
def _schema(kind: str) -> Schema:
    path = Path(KUBERAY / f"ray.io_{PLURALS[kind]}.yaml")
    crd = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    return schema


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_strict(_schema(kind)))


def errors_of(custom: dict[str, Any]) -> list[str]:
    """What the CRD has against a RayService or RayJob, defaults applied first as the API server
    does."""
    kind = custom["kind"]
    completed = deepcopy(custom)
    _apply_defaults(_schema(kind), completed)
    return [
        f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}"
        for error in _validator(kind).iter_errors(completed)
    ]


def _strict(schema: Schema) -> Schema:
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        found["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found[key] = _strict(schema[key])
    return found


def _apply_defaults(schema: Schema, value: Any) -> None:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if "default" in part:
                value.setdefault(name, deepcopy(part["default"]))
            if name in value:
                _apply_defaults(part, value[name])
        if isinstance(schema.get("additionalProperties"), dict):
            for part in value.values():
                _apply_defaults(schema["additionalProperties"], part)
    elif isinstance(value, list) and "items" in schema:
        for part in value:
            _apply_defaults(schema["items"], part)
