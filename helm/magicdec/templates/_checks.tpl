{{- /* What cannot work ends here, with the value and the limit, before anything is installed. */ -}}
{{- define "magicdec.check" -}}
{{- $v := .Values -}}
{{- $name := include "magicdec.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- fail (printf "the RayService's name must have at most 47 characters, got %d: %s; set fullnameOverride" (len $name) $name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the RayService's name must be of small letters, digits and -, and begin with a letter, got %s; set fullnameOverride" $name) -}}
{{- end -}}
{{- $tp := int $v.parallel.tensorParallelSize -}}
{{- $gpus := int $v.worker.gpus -}}
{{- if and (gt $gpus 0) (ne (mod $gpus $tp) 0) -}}
{{- fail (printf "parallel.tensorParallelSize must divide worker.gpus: the ranks of a replica are in one pod, got %d and %d" $tp $gpus) -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (not (kindIs "invalid" $v.serve.replicas)) -}}
{{- fail (printf "serve.replicas must be null where autoscaling.enabled is true, got %d" (int $v.serve.replicas)) -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas)) -}}
{{- fail (printf "autoscaling.maxReplicas must be at least autoscaling.minReplicas (%d), got %d" (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- $drain := int $v.drain.streamSeconds -}}
{{- $grace := int (include "magicdec.gracePeriod" .) -}}
{{- if lt $grace (add $drain 10 | int) -}}
{{- fail (printf "drain.terminationGracePeriodSeconds must be at least drain.streamSeconds and 10 more (%d), got %d: pods would be killed with streams in them" (add $drain 10) $grace) -}}
{{- end -}}
{{- $delay := int (include "magicdec.deletionDelay" .) -}}
{{- if lt $delay $drain -}}
{{- fail (printf "drain.clusterDeletionDelaySeconds must be at least drain.streamSeconds (%d), got %d: an upgrade would cut streams" $drain $delay) -}}
{{- end -}}
{{- include "magicdec.checkSources" . -}}
{{- include "magicdec.checkUpgrade" . -}}
{{- include "magicdec.checkRest" . -}}
{{- end -}}

{{- define "magicdec.checkSources" -}}
{{- $v := .Values -}}
{{- if eq $v.model.source "pvc" -}}
{{- if not $v.model.pvc.existingClaim -}}
{{- fail "model.pvc.existingClaim must name a claim where model.source is pvc, got none" -}}
{{- end -}}
{{- if not (hasPrefix $v.model.pvc.mountPath $v.model.path) -}}
{{- fail (printf "model.path must be under model.pvc.mountPath (%s) where model.source is pvc, got %s" $v.model.pvc.mountPath $v.model.path) -}}
{{- end -}}
{{- end -}}
{{- if eq $v.model.source "url" -}}
{{- if not (regexMatch "^https?://" $v.model.url.archive) -}}
{{- fail (printf "model.url.archive must be an http(s) address where model.source is url, got %q" $v.model.url.archive) -}}
{{- end -}}
{{- if not (regexMatch "^[0-9a-f]{64}$" $v.model.url.sha256) -}}
{{- fail (printf "model.url.sha256 must be 64 hexadecimal digits where model.source is url, got %q" $v.model.url.sha256) -}}
{{- end -}}
{{- if not (hasPrefix "/models/" $v.model.path) -}}
{{- fail (printf "model.path must be under /models/ where model.source is url, got %s" $v.model.path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "magicdec.checkUpgrade" -}}
{{- $u := .Values.upgrade -}}
{{- if eq $u.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $u.gatewayClassName -}}
{{- fail "upgrade.gatewayClassName must name a class for an incremental upgrade, got none" -}}
{{- end -}}
{{- if not .Values.autoscaling.enabled -}}
{{- fail "autoscaling.enabled must be true for an incremental upgrade: the operator moves replicas between clusters by it, got false" -}}
{{- end -}}
{{- if gt (int $u.stepSizePercent) (int $u.maxSurgePercent) -}}
{{- fail (printf "upgrade.stepSizePercent must be at most upgrade.maxSurgePercent (%d), got %d" (int $u.maxSurgePercent) (int $u.stepSizePercent)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "magicdec.checkRest" -}}
{{- $v := .Values -}}
{{- if and (eq $v.gcsFaultTolerance.backend "redis") (not $v.gcsFaultTolerance.redis.address) -}}
{{- fail "gcsFaultTolerance.redis.address must be host:port where the backend is redis, got none" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs must name a Gateway where httpRoute.enabled is true, got none" -}}
{{- end -}}
{{- if and $v.batch.enabled (not $v.batch.entrypoint) (not (and $v.batch.input $v.batch.output)) -}}
{{- fail "batch.input and batch.output must both be given where batch.enabled is true, or batch.entrypoint" -}}
{{- end -}}
{{- if and $v.batch.entrypoint (or $v.batch.input $v.batch.output $v.batch.args) -}}
{{- fail "batch.entrypoint stands for the whole command: batch.input, batch.output and batch.args must be empty beside it" -}}
{{- end -}}
{{- $most := ternary (int $v.autoscaling.minReplicas) (int (default 1 $v.serve.replicas)) $v.autoscaling.enabled -}}
{{- $pods := int (include "magicdec.pods" (list . $most)) -}}
{{- if and $v.podDisruptionBudget.enabled (ge (int $v.podDisruptionBudget.minAvailable) $pods) -}}
{{- fail (printf "podDisruptionBudget.minAvailable must be below the number of workers (%d), got %d: no node could be drained" $pods (int $v.podDisruptionBudget.minAvailable)) -}}
{{- end -}}
{{- if and $v.cache.enabled (not $v.cache.existingClaim) (gt $pods 1) (not (has "ReadWriteMany" $v.cache.accessModes)) -}}
{{- fail (printf "cache.accessModes must hold ReadWriteMany for %d workers, got %s" $pods (join ", " $v.cache.accessModes)) -}}
{{- end -}}
{{- end -}}
