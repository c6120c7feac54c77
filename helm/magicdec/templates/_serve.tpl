{{- /* The sections of the server's settings that say how a model is run. */ -}}
{{- define "magicdec.engineSettings" -}}
{{- $v := .Values -}}
model:
  path: {{ $v.model.path | quote }}
  dtype: {{ $v.model.dtype }}
  {{- with $v.model.servedName }}
  served_name: {{ . | quote }}
  {{- end }}
  {{- if not (kindIs "invalid" $v.model.maxModelLen) }}
  max_model_len: {{ int $v.model.maxModelLen }}
  {{- end }}
{{- range $section := list "cache" "scheduler" "speculation" }}
{{- with index $v.settings $section }}
{{ $section }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
parallel:
  tensor_parallel_size: {{ int $v.parallel.tensorParallelSize }}
  use_gpu: {{ gt (int $v.worker.gpus) 0 }}
  {{- if not (kindIs "invalid" $v.parallel.numThreads) }}
  num_threads: {{ int $v.parallel.numThreads }}
  {{- end }}
{{- end -}}

{{- /* The Serve config: the sections of the server's settings are the application's arguments. */ -}}
{{- define "magicdec.serveConfig" -}}
{{- $v := .Values -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: magicdec
    route_prefix: /
    import_path: magicdec.deployments.app:app_builder
    args:
      {{- include "magicdec.engineSettings" . | nindent 6 }}
      server:
        {{- if $v.autoscaling.enabled }}
        autoscaling:
          min_replicas: {{ int $v.autoscaling.minReplicas }}
          max_replicas: {{ int $v.autoscaling.maxReplicas }}
          target_kv_usage: {{ $v.autoscaling.targetKvUsage }}
          upscale_delay_s: {{ $v.autoscaling.upscaleDelaySeconds }}
          downscale_delay_s: {{ $v.autoscaling.downscaleDelaySeconds }}
        {{- else }}
        num_replicas: {{ int (default 1 $v.serve.replicas) }}
        {{- end }}
        num_ingress_replicas: {{ int $v.serve.ingressReplicas }}
        max_queued_requests: {{ int $v.serve.maxQueuedRequests }}
        prefix_affinity: {{ $v.serve.prefixAffinity }}
        length_classes: {{ $v.serve.lengthClasses }}
        age_bound_s: {{ $v.serve.ageBoundSeconds }}
        keep_alive_s: {{ $v.serve.keepAliveSeconds }}
        replica_wait_s: {{ $v.serve.replicaWaitSeconds }}
        drain_timeout_s: {{ int $v.drain.streamSeconds }}
        drain_file: /tmp/magicdec-draining
        {{- if $v.apiKeys.existingSecret }}
        api_keys_file: /etc/magicdec/{{ $v.apiKeys.key }}
        {{- end }}
{{- if eq (int $v.worker.gpus) 0 }}
    deployments:
      # CPUs only admit: without this all replicas would share the cores of one pod.
      - name: EngineReplica
        max_replicas_per_node: 1
{{- end }}
{{- end -}}
