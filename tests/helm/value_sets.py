"""Generated values that can work, over every switch of the chart."""

from typing import Any

from hypothesis import strategies as st

from tests.helm.chart import Values

_HASH = "0123456789abcdef" * 4
_QUANTITIES = st.sampled_from(["500m", "2", "16"])
_MAPS = st.dictionaries(st.sampled_from(["team", "tier"]), st.sampled_from(["a", "b"]), max_size=2)
_TOLERATIONS = st.sampled_from([[], [{"key": "nvidia.com/gpu", "operator": "Exists"}]])


def _optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Values]:
    return st.fixed_dictionaries({}, optional=fields)


_MODELS = st.sampled_from(
    [
        {"path": "smollm2-135m-instruct"},
        {"path": "Qwen/Qwen3-8B", "maxModelLen": 32768, "dtype": "float16", "servedName": "q"},
        {"path": "/models/a/b", "source": "pvc", "pvc": {"existingClaim": "models"}},
        {
            "path": "/models/m",
            "source": "url",
            "url": {"archive": "https://example.com/m.tar.gz", "sha256": _HASH},
        },
    ]
)
_SETTINGS = _optional(
    cache=_optional(
        kv_cache_gib=st.none() | st.floats(0.5, 64),
        memory_share=st.floats(0.5, 1),
        block_size=st.sampled_from([16, 64, 256]),
    ),
    scheduler=_optional(max_num_seqs=st.integers(1, 64), max_batch_tokens=st.integers(256, 8192)),
    speculation=st.sampled_from(
        [
            {},
            {"draft_length": 4, "drafter": "snapkv", "draft_budget": 512},
            {"draft_length": 0},
            {"draft_budget": 0.1},
            {"drafters": ["recycled", "ngram"], "draft_budgets": [256, 512]},
        ]
    ),
)
_FAULT_TOLERANCE = st.sampled_from(
    [
        {"backend": "none"},
        {"backend": "redis", "redis": {"address": "redis:6379"}},
        {"backend": "redis", "redis": {"address": "redis:6379", "existingSecret": "redis"}},
        {"backend": "rocksdb"},
        {"backend": "rocksdb", "rocksdb": {"existingClaim": "gcs"}},
    ]
)
_VOLUMES = st.sampled_from([{}, {"enabled": True}, {"enabled": True, "existingClaim": "c"}])
_OUTSIDE = _optional(
    ingress=_optional(
        enabled=st.booleans(), className=st.sampled_from(["", "nginx"]), tlsSecret=st.just("tls")
    ),
    httpRoute=st.sampled_from(
        [{}, {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["llm.example"]}]
    ),
    networkPolicy=_optional(
        enabled=st.booleans(),
        ingressFrom=st.sampled_from([[], [{"podSelector": {"matchLabels": {"app": "web"}}}]]),
    ),
    service=_optional(type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"])),
    apiKeys=st.sampled_from([{}, {"existingSecret": "keys", "key": "accepted"}]),
    podMonitor=_optional(enabled=st.booleans(), labels=_MAPS),
    prometheusRule=_optional(enabled=st.booleans(), labels=_MAPS),
    dashboard=_optional(enabled=st.booleans()),
    serviceAccount=_optional(create=st.booleans(), annotations=_MAPS),
    hfToken=st.sampled_from([{}, {"existingSecret": "hf"}]),
    rayAuth=_optional(mode=st.sampled_from(["token", "disabled"])),
    podLabels=_MAPS,
    podAnnotations=_MAPS,
    priorityClassName=st.sampled_from(["", "high"]),
    imagePullSecrets=st.sampled_from([[], [{"name": "registry"}]]),
    extraEnv=st.sampled_from([[], [{"name": "NCCL_DEBUG", "value": "WARN"}]]),
    extraEnvFrom=st.sampled_from([[], [{"secretRef": {"name": "more"}}]]),
    image=_optional(
        tag=st.sampled_from(["", "1.2.3"]), digest=st.sampled_from(["", f"sha256:{_HASH}"])
    ),
    batch=st.sampled_from(
        [
            {},
            {"enabled": True, "entrypoint": "magicdec --help", "activeDeadlineSeconds": 3600},
            {"enabled": True, "input": "/data/in.jsonl", "output": "/data/out.jsonl", "workers": 2},
        ]
    ),
)


@st.composite
def value_sets(draw: st.DrawFn) -> Values:
    ranks = draw(st.sampled_from([1, 2, 4]))
    gpus = draw(st.sampled_from([0, ranks, 2 * ranks]))
    replicas = draw(st.integers(1, 5))
    worker: Values = {"gpus": gpus, "tolerations": draw(_TOLERATIONS), "shmSize": "8Gi"}
    worker["resources"] = {"requests": {"cpu": draw(_QUANTITIES)}, "limits": {"memory": "16Gi"}}
    values: Values = {
        "model": draw(_MODELS),
        "settings": draw(_SETTINGS),
        "parallel": {"tensorParallelSize": ranks},
        "worker": worker,
        "gcsFaultTolerance": draw(_FAULT_TOLERANCE),
        "drain": {"streamSeconds": draw(st.integers(1, 7200))},
        "cache": draw(_VOLUMES),
        **draw(_OUTSIDE),
    }
    if draw(st.booleans()):
        most = replicas + draw(st.integers(0, 3))
        values["autoscaling"] = {"enabled": True, "minReplicas": replicas, "maxReplicas": most}
        kind = draw(st.sampled_from(["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]))
        values["upgrade"] = {"type": kind, "gatewayClassName": "istio"}
    else:
        values["serve"] = {"replicas": replicas}
        values["upgrade"] = {"type": draw(st.sampled_from(["NewCluster", "None"]))}
    per_pod = max(gpus // ranks, 1)
    pods = -(-replicas // per_pod)
    if pods > 1:
        values["podDisruptionBudget"] = {"enabled": True, "minAvailable": pods - 1}
    return values
