{{- define "magicdec.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 47 | trimSuffix "-" -}}
{{- end -}}

{{- define "magicdec.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "magicdec.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "magicdec.name" .) -}}
{{- end -}}
{{- end -}}

{{- define "magicdec.selector" -}}
app.kubernetes.io/name: {{ include "magicdec.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "magicdec.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "magicdec.selector" . }}
{{- end -}}

{{- define "magicdec.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- $flavour := ternary "cuda" "cpu" (gt (int .Values.worker.gpus) 0) -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s-%s" .Chart.AppVersion $flavour) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "magicdec.serviceAccount" -}}
{{- default (ternary (include "magicdec.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "magicdec.cacheClaim" -}}
{{- default (printf "%s-cache" (include "magicdec.fullname" .)) .Values.cache.existingClaim -}}
{{- end -}}

{{- /* Replicas that one pod holds: on GPUs as many as its ranks have room, on CPUs one. */ -}}
{{- define "magicdec.replicasPerPod" -}}
{{- if gt (int .Values.worker.gpus) 0 -}}
{{- div (int .Values.worker.gpus) (int .Values.parallel.tensorParallelSize) -}}
{{- else -}}
1
{{- end -}}
{{- end -}}

{{- /* Pods for so many replicas: (list . replicas). */ -}}
{{- define "magicdec.pods" -}}
{{- $perPod := int (include "magicdec.replicasPerPod" (first .)) -}}
{{- div (add (int (last .)) (sub $perPod 1)) $perPod -}}
{{- end -}}

{{- define "magicdec.gracePeriod" -}}
{{- if kindIs "invalid" .Values.drain.terminationGracePeriodSeconds -}}
{{- add (int .Values.drain.streamSeconds) 30 -}}
{{- else -}}
{{- int .Values.drain.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end -}}

{{- define "magicdec.deletionDelay" -}}
{{- if kindIs "invalid" .Values.drain.clusterDeletionDelaySeconds -}}
{{- add (int .Values.drain.streamSeconds) 30 -}}
{{- else -}}
{{- int .Values.drain.clusterDeletionDelaySeconds -}}
{{- end -}}
{{- end -}}
