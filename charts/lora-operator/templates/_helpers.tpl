{{/* Beginning of every name, short enough for the longest ending. */}}
{{- define "lora-operator.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels by which the pod is found. They cannot change, so nothing that an upgrade changes is among them. */}}
{{- define "lora-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lora-operator.labels" -}}
{{ include "lora-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "lora-operator.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "lora-operator.fullname" .) -}}
{{- end -}}

{{/* An image's full name, from (dict "image" VALUES "context" $). */}}
{{- define "lora-operator.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .context.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/*
What the operator may do, by purpose. The same table is lora_operator.kube.RBAC; a test compares the two.
*/}}
{{- define "lora-operator.rules.runs" -}}
# What is asked for.
- apiGroups: [lorafinetune.io]
  resources: [lorafinetunes]
  verbs: [delete, get, list, watch]
# What was seen, by server-side apply.
- apiGroups: [lorafinetune.io]
  resources: [lorafinetunes/status]
  verbs: [patch]
{{- end -}}

{{- define "lora-operator.rules.gangs" -}}
# The gang of an attempt: apply, end it, follow it.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [create, delete, get, list, patch, watch]
# Name and input of the gang: apply.
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [create, delete, get, patch]
# How the pods of the gang fare.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Progress, and the last lines of a failed pod.
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
# Why a run waits in its queue (Kueue), and its number there.
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
- apiGroups: [visibility.kueue.x-k8s.io]
  resources: [localqueues/pendingworkloads]
  verbs: [get]
{{- with get (dict "volcano" "scheduling.volcano.sh" "coscheduling" "scheduling.x-k8s.io") .Values.operator.gangScheduler }}
# What the gang scheduler starts together.
- apiGroups: [{{ . }}]
  resources: [podgroups]
  verbs: [create, delete, get, patch]
{{- end }}
{{- end -}}

{{- define "lora-operator.rules.events" -}}
# Tell changes of state; see why a Job's pods are not made.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list]
{{- end -}}
