"""values.schema.json: types from values.yaml, limits from here, settings from the server's own."""

import json
from typing import Any

import yaml

from magicdec.deployments.settings import ServeSettings
from tests.helm.chart import CHART
from tests.helm.setting_limits import limited

Schema = dict[str, Any]

NUMBER, POSITIVE = {"type": "number"}, {"type": "integer", "minimum": 1}
SECONDS = {"type": "integer", "minimum": 1}
ANY_MAP, ANY_LIST = {"type": "object"}, {"type": "array", "items": {"type": "object"}}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
PERCENT = {"type": "integer", "minimum": 1, "maximum": 100}

# By path; what is not here has the type of its default.
LIMITS: dict[str, Schema] = {
    "nameOverride": {"type": "string", "maxLength": 47},
    "fullnameOverride": {"type": "string"},
    "image.repository": {"type": "string", "minLength": 1},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    "model.path": {"type": "string", "minLength": 1},
    "model.dtype": {"enum": ["float32", "bfloat16", "float16"]},
    "model.maxModelLen": {"type": ["integer", "null"], "minimum": 1},
    "model.source": {"enum": ["image", "pvc", "url"]},
    "parallel.tensorParallelSize": POSITIVE,
    "parallel.numThreads": {"type": ["integer", "null"], "minimum": 1},
    "serve.replicas": {"type": ["integer", "null"], "minimum": 1},
    "serve.ingressReplicas": POSITIVE,
    "serve.maxQueuedRequests": POSITIVE,
    "serve.ageBoundSeconds": {"type": "number", "minimum": 1},
    "serve.keepAliveSeconds": {"type": "number", "exclusiveMinimum": 0},
    "serve.replicaWaitSeconds": {"type": "number", "exclusiveMinimum": 0},
    "autoscaling.minReplicas": POSITIVE,
    "autoscaling.maxReplicas": POSITIVE,
    "autoscaling.targetKvUsage": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "autoscaling.upscaleDelaySeconds": {"type": "number", "minimum": 0},
    "autoscaling.downscaleDelaySeconds": {"type": "number", "minimum": 0},
    "autoscaling.idlePodSeconds": SECONDS,
    "head.resources": ANY_MAP,
    "worker.gpus": {"type": "integer", "minimum": 0},
    "worker.gpuResource": {"type": "string", "minLength": 1},
    "worker.resources": ANY_MAP,
    "cache.accessModes": {
        "type": "array",
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
    },
    "upgrade.type": {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]},
    "upgrade.stepSizePercent": PERCENT,
    "upgrade.intervalSeconds": SECONDS,
    "upgrade.maxSurgePercent": PERCENT,
    "upgrade.initializingTimeoutSeconds": SECONDS,
    "drain.streamSeconds": SECONDS,
    "drain.terminationGracePeriodSeconds": {"type": ["integer", "null"], "minimum": 1},
    "drain.clusterDeletionDelaySeconds": {"type": ["integer", "null"], "minimum": 1},
    "gcsFaultTolerance.backend": {"enum": ["none", "redis", "rocksdb"]},
    "rayAuth.mode": {"enum": ["token", "disabled"]},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "ingress.timeoutSeconds": SECONDS,
    "httpRoute.hostnames": {"type": "array", "items": {"type": "string"}},
    "httpRoute.timeoutSeconds": SECONDS,
    "podDisruptionBudget.minAvailable": {"type": "integer", "minimum": 0},
    "podMonitor.interval": {"type": "string", "pattern": r"^\d+(ms|s|m)$"},
    "podSecurityContext": ANY_MAP,
    "containerSecurityContext": ANY_MAP,
    "dashboard.labels": STRINGS,
    "batch.args": {"type": "array", "items": {"type": "string"}},
    "batch.workers": POSITIVE,
    "batch.backoffLimit": {"type": "integer", "minimum": 0},
    "batch.ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
    "batch.activeDeadlineSeconds": {"type": ["integer", "null"], "minimum": 1},
}
FREE_MAPS = ("nodeSelector", "podLabels", "labels", "annotations", "podAnnotations")


def build_schema() -> Schema:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = _of(values, ())
    # Helm hands these to every chart, and to one that is a dependency.
    schema["properties"] |= {"global": ANY_MAP}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _of(value: Any, path: tuple[str, ...]) -> Schema:
    limit = LIMITS.get(".".join(path))
    if limit is not None:
        return limit
    if path[:1] == ("settings",) and len(path) == 2:
        return _settings(path[1])
    match value:
        case bool():
            return {"type": "boolean"}
        case str():
            return {"type": "string"}
        case list():
            return ANY_LIST
        case dict() if path[-1:] and path[-1] in FREE_MAPS:
            return STRINGS
        case {}:
            if not value:
                return ANY_MAP
            properties = {key: _of(part, (*path, key)) for key, part in value.items()}
            return {"type": "object", "additionalProperties": False, "properties": properties}
    raise TypeError(f"{'.'.join(path)}: {value!r} needs a line in LIMITS")


def _settings(section: str) -> Schema:
    """What the server accepts: pydantic's schema without its texts, and the engine's limits."""
    model = ServeSettings.model_fields[section].annotation
    assert model is not None
    found = model.model_json_schema()
    plain: Schema = _without_texts(found)
    properties = plain["properties"].items()
    plain["properties"] = {name: limited(section, name, part) for name, part in properties}
    return plain


def _without_texts(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_texts(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = ("description", "title", "default")
    return {
        key: _without_texts(part)
        for key, part in schema.items()
        if key not in dropped or isinstance(part, dict)
    }


def schema_text() -> str:
    return json.dumps(build_schema(), indent=1) + "\n"
