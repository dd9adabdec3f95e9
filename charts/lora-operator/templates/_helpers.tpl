{{/*
Gives each value that is missing its default. `helm upgrade --reuse-values` puts the values of the earlier release in the
place of values.yaml, so all that is new since then would be empty: a number 0, a switch off. Every template begins with it.
*/}}
{{- define "lora-operator.defaults" -}}
{{- range $path, $default := .Files.Get "files/defaults.yaml" | fromYaml -}}
{{- $at := $.Values -}}
{{- $names := splitList "." $path -}}
{{- range $name := initial $names -}}
{{- if not (kindIs "map" (index $at $name)) -}}{{- $_ := set $at $name dict -}}{{- end -}}
{{- $at = index $at $name -}}
{{- end -}}
{{- if kindIs "invalid" (index $at (last $names)) -}}{{- $_ := set $at (last $names) $default -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Beginning of every name, short enough for the longest ending. */}}
{{- define "lora-operator.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels by which the pod is found. They cannot change, so nothing that an upgrade changes is among them. */}}
{{- define "lora-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/*
Fails, with words for what to do, where an object of the whole cluster belongs to another release. Helm says only that it
cannot take it over. Not asked without a cluster: `helm template` finds nothing.
*/}}
{{- define "lora-operator.free" -}}
{{- $found := lookup .apiVersion .kind "" .name -}}
{{- $notes := dig "metadata" "annotations" dict ($found | default dict) -}}
{{- $name := get $notes "meta.helm.sh/release-name" -}}
{{- $namespace := get $notes "meta.helm.sh/release-namespace" -}}
{{- if and $name (or (ne $name .context.Release.Name) (ne $namespace .context.Release.Namespace)) -}}
{{- fail (printf "%s %s belongs to release %s in namespace %s: %s" .kind .name $name $namespace .remedy) -}}
{{- end -}}
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

{{/* A role for one purpose and its binding: (dict "purpose" NAME "namespace" NAME-OR-EMPTY "context" $). */}}
{{- define "lora-operator.role" -}}
{{- $name := printf "%s-%s" (include "lora-operator.fullname" .context) .purpose }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ ternary "Role" "ClusterRole" (ne .namespace "") }}
metadata:
  name: {{ $name }}
  {{- if .namespace }}
  namespace: {{ .namespace }}
  {{- end }}
  labels:
    {{- include "lora-operator.labels" .context | nindent 4 }}
rules:
  {{- include (printf "lora-operator.rules.%s" .purpose) .context | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ ternary "RoleBinding" "ClusterRoleBinding" (ne .namespace "") }}
metadata:
  name: {{ $name }}
  {{- if .namespace }}
  namespace: {{ .namespace }}
  {{- end }}
  labels:
    {{- include "lora-operator.labels" .context | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ ternary "Role" "ClusterRole" (ne .namespace "") }}
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "lora-operator.serviceAccountName" .context }}
    namespace: {{ .context.Release.Namespace }}
{{- end -}}

{{/*
What the operator may do, by purpose. The same table is lora_operator.kube.rights.RBAC; a test compares the two.
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
# Labels of the run's namespace: who may take a runtime.
- apiGroups: [""]
  resources: [namespaces]
  verbs: [get]
{{- end -}}

{{- define "lora-operator.rules.gangs" -}}
# The gang of an attempt: make it, end it, follow it.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [create, delete, get, list, patch, watch]
# The names by which pods of a gang find each other.
- apiGroups: [""]
  resources: [services]
  verbs: [create, delete, get]
# Input that earlier releases gave to pods: it goes with the rest.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [delete, get]
# Who may speak to the pods of a run, and to whom they may.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, delete, get]
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
  verbs: [create, delete, get]
{{- end }}
{{- end -}}

{{- define "lora-operator.rules.runtimes" -}}
# What runs take from an administrator.
- apiGroups: [lorafinetune.io]
  resources: [clusterloraruntimes]
  verbs: [get, list, watch]
{{- if .Values.defaultRuntime.enabled }}
# The one that comes with this chart.
- apiGroups: [lorafinetune.io]
  resources: [clusterloraruntimes]
  resourceNames: [default]
  verbs: [create, patch]
{{- end }}
{{- end -}}

{{- define "lora-operator.rules.events" -}}
# Tell changes of state; see why a Job's pods are not made.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list]
{{- end -}}

{{- define "lora-operator.rules.reviews" -}}
# Who asks for /metrics, and whether they may have it.
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
{{- end -}}
