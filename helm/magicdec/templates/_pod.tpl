{{- /* One pod template: (dict "root" . "role" "head"|"worker" "batch" bool). */ -}}
{{- define "magicdec.pod" -}}
{{- $v := .root.Values -}}
{{- $worker := eq .role "worker" -}}
{{- $pod := index $v .role -}}
metadata:
  labels:
    {{- include "magicdec.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ printf "%s%s" (ternary "batch-" "" .batch) .role }}
    {{- with $v.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $v.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "magicdec.serviceAccount" .root }}
  automountServiceAccountToken: {{ and (not $worker) $v.autoscaling.enabled (not .batch) }}
  terminationGracePeriodSeconds: {{ include "magicdec.gracePeriod" .root }}
  securityContext: {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- with $v.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $pod $field }}
  {{ $field }}: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if $worker }}
  {{- with $pod.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- end }}
  {{- if and (eq $v.model.source "url") (or $worker .batch) }}
  initContainers:
    {{- include "magicdec.fetchModel" .root | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ printf "ray-%s" .role }}
      image: {{ include "magicdec.image" .root | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext: {{- toYaml $v.containerSecurityContext | nindent 8 }}
      ports:
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
        {{- if not $worker }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
      {{- if $worker }}
      {{- if not .batch }}
      # Serve has a proxy in every pod that holds one of its replicas, and the ranks of a replica are in
      # one pod: so a pod without a proxy holds nothing, and gets no traffic. Needs neither bash nor wget.
      readinessProbe:
        httpGet: {path: /-/healthz, port: serve}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 3
      {{- end }}
      {{- end }}
      {{- if and $worker (not .batch) }}
      # Its replicas take nothing new, and it ends once they have nothing left.
      lifecycle:
        preStop:
          exec:
            command: [python, -m, magicdec.deployments.drain_pod, /tmp/magicdec-draining, "{{ int $v.drain.streamSeconds }}"]
      {{- end }}
      resources: {{- include "magicdec.resources" (dict "root" .root "role" .role) | nindent 8 }}
      env: {{- include "magicdec.env" .root | nindent 8 }}
      {{- with $v.extraEnvFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts: {{- include "magicdec.mounts" . | nindent 8 }}
  volumes: {{- include "magicdec.volumes" . | nindent 4 }}
{{- end -}}

{{- define "magicdec.resources" -}}
{{- $v := .root.Values -}}
{{- $resources := deepCopy (index $v .role).resources -}}
{{- if and (eq .role "worker") (gt (int $v.worker.gpus) 0) -}}
{{- $gpus := dict $v.worker.gpuResource (int $v.worker.gpus) -}}
{{- $limits := merge $gpus (default dict $resources.limits) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "magicdec.env" -}}
- {name: HOME, value: /tmp/home}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_USE_GRPC_BY_DEFAULT, value: "1"}
{{- with .Values.hfToken }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* A service's head needs no model and no keys. A job's driver runs on its head, and tokenizes. */ -}}
{{- define "magicdec.mounts" -}}
{{- $v := .root.Values -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /cache}
{{- if or (eq .role "worker") .batch }}
{{- if eq $v.model.source "pvc" }}
- {name: model, mountPath: {{ $v.model.pvc.mountPath | quote }}, readOnly: true}
{{- else if eq $v.model.source "url" }}
- {name: model, mountPath: /models}
{{- end }}
{{- end }}
{{- if and (eq .role "worker") $v.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/magicdec, readOnly: true}
{{- end }}
{{- with $v.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "magicdec.volumes" -}}
{{- $v := .root.Values -}}
{{- $worker := eq .role "worker" -}}
- {name: tmp, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $v.worker.shmSize | quote }}}}
{{- if and $worker $v.cache.enabled }}
- {name: cache, persistentVolumeClaim: {claimName: {{ include "magicdec.cacheClaim" .root }}}}
{{- else }}
- {name: cache, emptyDir: {}}
{{- end }}
{{- if or $worker .batch }}
{{- if eq $v.model.source "pvc" }}
- {name: model, persistentVolumeClaim: {claimName: {{ $v.model.pvc.existingClaim }}, readOnly: true}}
{{- else if eq $v.model.source "url" }}
- {name: model, emptyDir: {}}
{{- end }}
{{- end }}
{{- if and $worker $v.apiKeys.existingSecret }}
- {name: api-keys, secret: {secretName: {{ $v.apiKeys.existingSecret }}}}
{{- end }}
{{- with $v.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Unpacks the archive in model.path, and nothing that is not the one named by its checksum. */ -}}
{{- define "magicdec.fetchModel" -}}
- name: fetch-model
  image: {{ include "magicdec.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  securityContext: {{- toYaml .Values.containerSecurityContext | nindent 4 }}
  command:
    - python
    - -c
    - |
      import hashlib, sys, tarfile, urllib.request
      url, wanted, folder = sys.argv[1:]
      digest = hashlib.sha256()
      with urllib.request.urlopen(url) as answer, open("/models/archive", "wb") as archive:
          while block := answer.read(1 << 22):
              digest.update(block)
              archive.write(block)
      if digest.hexdigest() != wanted:
          sys.exit(f"sha256 of {url} must be {wanted}, got {digest.hexdigest()}")
      with tarfile.open("/models/archive") as archive:
          archive.extractall(folder, filter="data")
    - {{ .Values.model.url.archive | quote }}
    - {{ .Values.model.url.sha256 | quote }}
    - {{ .Values.model.path | quote }}
  resources:
    requests: {cpu: 500m, memory: 512Mi}
    limits: {memory: 512Mi}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
