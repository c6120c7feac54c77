{{- /* A RayCluster's spec: (dict "root" . "batch" bool "replicas" n "min" n "max" n). */ -}}
{{- define "magicdec.cluster" -}}
{{- $v := .root.Values -}}
rayVersion: {{ $v.rayVersion | quote }}
{{- if eq $v.rayAuth.mode "token" }}
authOptions: {mode: token}
{{- end }}
{{- if and $v.autoscaling.enabled (not .batch) }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ int $v.autoscaling.idlePodSeconds }}
  securityContext: {{- toYaml (omit $v.containerSecurityContext "readOnlyRootFilesystem") | nindent 4 }}
{{- end }}
{{- if not .batch }}
{{- include "magicdec.faultTolerance" .root }}
{{- end }}
headGroupSpec:
  # No CPUs: replicas are placed on workers, where nothing disturbs the cluster's own processes.
  rayStartParams: {num-cpus: "0", dashboard-host: "0.0.0.0"}
  template: {{- include "magicdec.pod" (dict "root" .root "role" "head" "batch" .batch) | nindent 4 }}
workerGroupSpecs:
  - groupName: workers
    replicas: {{ .replicas }}
    minReplicas: {{ .min }}
    maxReplicas: {{ .max }}
    rayStartParams: {}
    template: {{- include "magicdec.pod" (dict "root" .root "role" "worker" "batch" .batch) | nindent 6 }}
{{- end -}}

{{- define "magicdec.faultTolerance" -}}
{{- $ft := .Values.gcsFaultTolerance -}}
{{- if eq $ft.backend "redis" }}
gcsFaultToleranceOptions:
  backend: redis
  redisAddress: {{ $ft.redis.address | quote }}
  {{- if $ft.redis.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ $ft.redis.existingSecret }}, key: {{ $ft.redis.key }}}
  {{- end }}
{{- else if eq $ft.backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    {{- if $ft.rocksdb.existingClaim }}
    claimName: {{ $ft.rocksdb.existingClaim }}
    {{- else }}
    size: {{ $ft.rocksdb.size }}
    {{- with $ft.rocksdb.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end -}}
