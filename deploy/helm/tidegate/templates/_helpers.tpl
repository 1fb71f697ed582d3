{{/* What every name begins with: the release's name, with the chart's where that is not in it. */}}
{{- define "tidegate.name" -}}
{{- if contains "tidegate" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-tidegate" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object; the argument is a list of the context and the object's own name. */}}
{{- define "tidegate.labels" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: tidegate
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version }}
{{- end -}}

{{/* Labels that pods are selected by. */}}
{{- define "tidegate.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end -}}

{{- define "tidegate.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "tidegate.adminTokenSecret" -}}
{{ .Values.adminToken.existingSecret | default (printf "%s-admin-token" (include "tidegate.name" .)) }}
{{- end -}}

{{- define "tidegate.adapterSecret" -}}
{{- if eq .Values.adapter.certificate.source "existing" -}}
{{ .Values.adapter.certificate.existingSecret }}
{{- else -}}
{{ include "tidegate.name" . }}-adapter-tls
{{- end -}}
{{- end -}}

{{- define "tidegate.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tidegate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{- define "tidegate.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Rules that hold in each namespace with ModelPools. */}}
{{- define "tidegate.poolRules" -}}
- apiGroups: ["tidegate.dev"]
  resources: ["modelpools"]
  verbs: ["get", "list", "watch"]
- apiGroups: ["tidegate.dev"]
  resources: ["modelpools/status"]
  verbs: ["patch"]
- apiGroups: [""]
  resources: ["events"]
  verbs: ["create"]
- apiGroups: [""]
  resources: ["pods"]
  verbs: ["get", "list", "watch", "patch"]
- apiGroups: ["discovery.k8s.io"]
  resources: ["endpointslices"]
  verbs: ["get", "list", "watch"]
- apiGroups: ["apps"]
  resources: ["deployments", "statefulsets"]
  verbs: ["get", "create", "patch"]
- apiGroups: ["apps"]
  resources: ["deployments/scale", "statefulsets/scale"]
  verbs: ["get", "patch"]
- apiGroups: ["leaderworkerset.x-k8s.io"]
  resources: ["leaderworkersets"]
  verbs: ["get", "create", "patch"]
- apiGroups: ["leaderworkerset.x-k8s.io"]
  resources: ["leaderworkersets/scale"]
  verbs: ["get", "patch"]
- apiGroups: ["batch"]
  resources: ["jobs"]
  verbs: ["create", "delete", "list", "watch"]
- apiGroups: ["tidegate.dev"]
  resources: ["modelpools/finalizers"]
  verbs: ["update"]
- apiGroups: ["autoscaling"]
  resources: ["horizontalpodautoscalers"]
  verbs: ["list", "watch"]
- apiGroups: ["autoscaling.alibabacloud.com"]
  resources: ["advancedhorizontalpodautoscalers"]
  verbs: ["list", "watch"]
- apiGroups: ["inference.networking.k8s.io"]
  resources: ["inferencepools"]
  verbs: ["get"]
{{- if .Values.operator.otherWorkloads }}
- apiGroups: ["serving.kserve.io"]
  resources: ["inferenceservices"]
  verbs: ["get", "patch"]
- apiGroups: ["ray.io"]
  resources: ["rayclusters", "rayservices"]
  verbs: ["get", "patch"]
{{- end }}
{{- if .Values.operator.knative }}
- apiGroups: ["serving.knative.dev"]
  resources: ["services"]
  verbs: ["get"]
- apiGroups: ["autoscaling.internal.knative.dev"]
  resources: ["podautoscalers"]
  verbs: ["get", "list", "watch"]
- apiGroups: ["autoscaling.internal.knative.dev"]
  resources: ["podautoscalers/status"]
  verbs: ["patch"]
- apiGroups: ["autoscaling.internal.knative.dev"]
  resources: ["podautoscalers/finalizers"]
  verbs: ["update"]
- apiGroups: ["networking.internal.knative.dev"]
  resources: ["serverlessservices"]
  verbs: ["list", "watch", "create", "patch"]
{{- end }}
{{- end -}}
