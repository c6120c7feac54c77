"""What the chart renders, KubeRay and Kubernetes take; what cannot work is refused."""

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from magicdec.cluster.alerts import build_rules
from magicdec.cluster.dashboard import build_dashboard
from magicdec.cluster.placement import replica_bundles
from magicdec.deployments.app import build
from magicdec.deployments.settings import ServeSettings, parse_settings
from tests.helm.chart import (
    CHART,
    EXAMPLES,
    ROOT,
    Object,
    Refused,
    Release,
    Values,
    example,
    lint,
    render,
)
from tests.helm.crd import KUBERAY, PLURALS, errors_of
from tests.helm.value_sets import value_sets
from tests.helm.values_schema import schema_text
from tests.helm.values_table import documented_values, readme

KUBERNETES = "1.32"
# Of operators that are not here; the Gateway's and Prometheus's own CRDs are not either.
UNKNOWN_GROUPS = ("ray.io", "monitoring.coreos.com", "gateway.networking.k8s.io")
MAX_NAME = 47
needs_crds = pytest.mark.skipif(not KUBERAY.exists(), reason=f"KubeRay's CRDs are not in {KUBERAY}")


def check(release: Release) -> None:
    """Everything that can be known without a cluster."""
    for found in release.objects:
        if found["apiVersion"].partition("/")[0] not in UNKNOWN_GROUPS:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        if found["kind"] in PLURALS and KUBERAY.exists():
            assert not errors_of(found)
    for template in release.pod_templates():
        metadata = {"name": "p", **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        check_pod(template["spec"])
    check_operators_rules(release.service)
    names = [(found["kind"], found["metadata"]["name"]) for found in release.objects]
    assert len(set(names)) == len(names)


def check_pod(pod: Object) -> None:
    """Mounts have volumes, nothing runs as root or writes outside of them."""
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def check_operators_rules(service: Object) -> None:
    """What KubeRay's webhook and controller refuse, and its CRD does not say."""
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    assert len(service["metadata"]["name"]) <= MAX_NAME
    assert "headService" not in cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not {"num-cpus", "num-gpus", "memory"} & group["rayStartParams"].keys()
        if cluster.get("enableInTreeAutoscaling"):  # version v2
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
    if "gcsFaultToleranceOptions" in cluster:
        assert "redis-password" not in cluster["headGroupSpec"]["rayStartParams"]
    strategy = spec["upgradeStrategy"]
    if strategy["type"] == "NewClusterWithIncrementalUpgrade":
        options = strategy["clusterUpgradeOptions"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"]
        assert options["gatewayClassName"] and options["intervalSeconds"] > 0


def check_agreement(release: Release, values: Values) -> ServeSettings:
    """The parts of a release agree with each other."""
    settings = parse_settings(release.arguments)
    spec = release.service["spec"]
    drain = settings.server.drain_timeout_s
    assert spec["rayClusterDeletionDelaySeconds"] >= drain
    for template in release.pod_templates():
        assert template["spec"]["terminationGracePeriodSeconds"] > drain
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = worker["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
    assert settings.parallel.use_gpu is (gpus > 0)
    scaling = settings.server.autoscaling
    most = scaling.max_replicas if scaling else settings.server.num_replicas
    bundles = replica_bundles(settings.engine_config(), use_gpu=settings.parallel.use_gpu)
    needed = sum(bundle.get("GPU", 0) for bundle in bundles)
    if gpus > 0:  # the pods hold the replicas, and no pod is there for nothing
        assert needed <= gpus
        assert 0 <= group["maxReplicas"] * gpus - most * needed < gpus
    else:
        assert group["maxReplicas"] == most
    return settings


def test_the_default_values_render() -> None:
    release = render()
    check(release)
    check_agreement(release, {})
    assert "svc/demo-magicdec-serve-svc" in release.notes


def test_the_chart_lints() -> None:
    found = lint()
    assert not found["errors"]
    assert [message for message in found["messages"] if message["severity"] > 1] == []


@needs_crds
def test_a_crd_refuses_what_is_misspelt() -> None:
    service = render().service
    assert not errors_of(service)
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    (error,) = errors_of(service)
    assert "enableInTreeAutoscalling" in error


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_render_and_their_application_builds(path: Path) -> None:
    values = example(path)
    release = render(values)
    check(release)
    settings = check_agreement(release, values)
    build(settings)


def test_the_cpu_example_deploys_on_ray_and_answers() -> None:
    test = "tests/deployments/test_chart_on_ray.py::test_the_example_answers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value_sets())
def test_generated_values_render_what_kubernetes_takes(values: Values) -> None:
    release = render(values)
    check(release)
    check_agreement(release, values)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value_sets())
def test_many_generated_values_render_what_kubernetes_takes(values: Values) -> None:
    release = render(values)
    check(release)
    check_agreement(release, values)


AUTO = {"enabled": True}
URL = {"path": "/models/m", "source": "url"}
INCREMENTAL = {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}
IMPOSSIBLE: dict[str, tuple[Values, str]] = {
    "tp does not divide the GPUs": (
        {"parallel": {"tensorParallelSize": 3}, "worker": {"gpus": 8}},
        "tensorParallelSize must divide worker.gpus.* got 3 and 8",
    ),
    "more ranks than GPUs": (
        {"parallel": {"tensorParallelSize": 4}, "worker": {"gpus": 2}},
        "must divide worker.gpus.* got 4 and 2",
    ),
    "fixed and automatic replicas": (
        {"autoscaling": AUTO, "serve": {"replicas": 2}},
        "serve.replicas must be null where autoscaling.enabled is true, got 2",
    ),
    "bounds the wrong way round": (
        {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}},
        r"maxReplicas must be at least autoscaling.minReplicas \(3\), got 2",
    ),
    "pods killed while they drain": (
        {"drain": {"streamSeconds": 600, "terminationGracePeriodSeconds": 60}},
        r"terminationGracePeriodSeconds must be at least .* \(610\), got 60",
    ),
    "clusters deleted while they drain": (
        {"drain": {"streamSeconds": 600, "clusterDeletionDelaySeconds": 60}},
        r"clusterDeletionDelaySeconds must be at least drain.streamSeconds \(600\), got 60",
    ),
    "a long name": ({"fullnameOverride": "a" * 48}, "at most 47 characters, got 48"),
    "a name that is none": ({"fullnameOverride": "1st"}, "begin with a letter, got 1st"),
    "no claim": (
        {"model": {"path": "/models/m", "source": "pvc"}},
        "model.pvc.existingClaim must name a claim",
    ),
    "a model beside its volume": (
        {"model": {"path": "/other", "source": "pvc", "pvc": {"existingClaim": "c"}}},
        r"model.path must be under model.pvc.mountPath \(/models\).* got /other",
    ),
    "no archive": ({"model": URL}, "model.url.archive must be an http"),
    "no checksum": (
        {"model": {**URL, "url": {"archive": "https://example.com/m.tar"}}},
        "model.url.sha256 must be 64 hexadecimal digits",
    ),
    "an increment without a gateway": (
        {"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}, "autoscaling": AUTO},
        "upgrade.gatewayClassName must name a class",
    ),
    "an increment without autoscaling": (
        {"upgrade": INCREMENTAL},
        "autoscaling.enabled must be true for an incremental upgrade",
    ),
    "steps beyond the surge": (
        {
            "upgrade": {**INCREMENTAL, "stepSizePercent": 50, "maxSurgePercent": 20},
            "autoscaling": AUTO,
        },
        r"stepSizePercent must be at most upgrade.maxSurgePercent \(20\), got 50",
    ),
    "redis nowhere": ({"gcsFaultTolerance": {"backend": "redis"}}, "redis.address must be"),
    "a route to no gateway": ({"httpRoute": {"enabled": True}}, "parentRefs must name a Gateway"),
    "a job without a file for its answers": (
        {"batch": {"enabled": True, "input": "/data/in.jsonl"}},
        "batch.input and batch.output must both be given",
    ),
    "a job of two commands": (
        {"batch": {"enabled": True, "entrypoint": "ls", "input": "a", "output": "b"}},
        "batch.entrypoint stands for the whole command",
    ),
    "a budget that nothing passes": (
        {"serve": {"replicas": 3}, "podDisruptionBudget": {"enabled": True, "minAvailable": 3}},
        r"minAvailable must be below the number of workers \(3\), got 3",
    ),
    "a volume for one node": (
        {"serve": {"replicas": 2}, "cache": {"enabled": True, "accessModes": ["ReadWriteOnce"]}},
        "cache.accessModes must hold ReadWriteMany for 2 workers",
    ),
    # By the schema.
    "a value that nobody knows": ({"worker": {"gpu": 1}}, "'gpu' not allowed"),
    "a setting that nobody knows": (
        {"settings": {"speculation": {"draft_lenght": 3}}},
        "'draft_lenght' not allowed",
    ),
    "a setting beyond its limit": (
        {"settings": {"cache": {"kv_cache_gib": 0}}},
        "/settings/cache/kv_cache_gib",
    ),
    "a digest that is none": ({"image": {"digest": "sha256:12"}}, "/image/digest"),
    "no replicas": ({"serve": {"replicas": 0}}, "/serve/replicas"),
    "a text for a number": ({"worker": {"gpus": "8"}}, "/worker/gpus"),
    "a share above one": ({"autoscaling": {"targetKvUsage": 70}}, "/autoscaling/targetKvUsage"),
    "an upgrade that nobody knows": ({"upgrade": {"type": "Rolling"}}, "/upgrade/type"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_work_is_refused_with_the_reason(name: str) -> None:
    values, reason = IMPOSSIBLE[name]
    with pytest.raises(Refused, match=reason):
        render(values)


def test_a_long_release_name_is_refused() -> None:
    with pytest.raises(Refused, match="at most 47 characters, got 49"):
        render(name="a" * 40)


def container(release: Release, role: str) -> dict[str, Any]:
    for template in release.pod_templates():
        for found in template["spec"]["containers"]:
            if found["name"] == f"ray-{role}":
                container: dict[str, Any] = found
                return container
    raise AssertionError(f"no container of the {role}")


def test_an_image_is_named_by_its_digest_where_there_is_one() -> None:
    digest = "sha256:" + "0" * 64
    named = container(render({"image": {"digest": digest, "tag": "x"}}), "worker")["image"]
    assert named == f"magicdec@{digest}"
    assert container(render({"worker": {"gpus": 1}}), "head")["image"] == "magicdec:0.1.0-cuda"
    assert container(render(), "head")["image"] == "magicdec:0.1.0-cpu"


def test_workers_are_ready_by_their_proxy_without_tools_in_the_image() -> None:
    release = render()
    probe = container(release, "worker")["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    assert probe["failureThreshold"] == 3
    assert "readinessProbe" not in container(release, "head")


def test_workers_drain_by_the_file_that_their_replicas_watch() -> None:
    release = render({"drain": {"streamSeconds": 77}})
    *_, file, seconds = container(release, "worker")["lifecycle"]["preStop"]["exec"]["command"]
    server = release.arguments["server"]
    assert (file, seconds) == (server["drain_file"], "77") and server["drain_timeout_s"] == 77
    assert "lifecycle" not in container(release, "head")


def test_secrets_are_referred_to_and_never_in_the_values() -> None:
    release = render({"hfToken": {"existingSecret": "hf"}, "apiKeys": {"existingSecret": "keys"}})
    (token,) = [e for e in container(release, "worker")["env"] if e["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert release.arguments["server"]["api_keys_file"] == "/etc/magicdec/api-keys"
    assert release.of_kind("Secret") == []


def test_an_archive_is_unpacked_only_by_its_checksum(tmp_path: Path) -> None:
    """The init container's own script, run on a real archive."""
    (tmp_path / "config.json").write_text("{}")
    archive = tmp_path / "m.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "config.json", "config.json")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    url = {"archive": "https://example.com/m.tar.gz", "sha256": digest}
    release = render({"model": {**URL, "url": url}})
    worker = list(release.pod_templates())[1]["spec"]
    (fetch,) = worker["initContainers"]
    models = tmp_path / "models"
    models.mkdir()
    script = fetch["command"][2].replace("/models/", f"{models}/")
    for wanted, code in ((digest, 0), ("0" * 64, 1)):
        command = [sys.executable, "-c", script, archive.as_uri(), wanted, str(models / wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert (models / digest / "config.json").read_text() == "{}"
    assert not (models / ("0" * 64)).exists()
    assert "sha256 of" in done.stderr


def test_alerts_and_dashboard_are_those_of_the_metric_table() -> None:
    on = {"enabled": True}
    release = render({"prometheusRule": on, "dashboard": on})
    (rule,) = release.of_kind("PrometheusRule")
    assert rule["spec"] == build_rules()
    (config,) = release.of_kind("ConfigMap")
    assert yaml.safe_load(config["data"]["magicdec.json"]) == build_dashboard()


def test_budgets_and_policies_select_pods_by_labels_that_pods_have() -> None:
    on = {"enabled": True}
    more = {"podDisruptionBudget": on, "networkPolicy": on, "podMonitor": on}
    release = render({"serve": {"replicas": 2}, **more})
    pods = [template["metadata"]["labels"] for template in release.pod_templates()]
    (budget,) = release.of_kind("PodDisruptionBudget")
    (policy,) = release.of_kind("NetworkPolicy")
    (monitor,) = release.of_kind("PodMonitor")
    chosen = budget["spec"]["selector"]["matchLabels"].items()
    assert [chosen <= labels.items() for labels in pods] == [False, True]  # workers alone
    for selector in (policy["spec"]["podSelector"], monitor["spec"]["selector"]):
        assert all(selector["matchLabels"].items() <= labels.items() for labels in pods)


def test_the_readme_and_the_schema_are_generated() -> None:
    hint = "write them anew: python -m tests.helm.write_chart_files"
    assert (CHART / "README.md").read_text(encoding="utf-8") == readme(), hint
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == schema_text(), hint


def test_every_value_is_documented() -> None:
    undocumented = [".".join(value.path) for value in documented_values() if not value.text]
    assert not undocumented
