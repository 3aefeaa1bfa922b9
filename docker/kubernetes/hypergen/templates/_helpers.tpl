{{- define "hypergen.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" (.Release.Name | trunc 31 | trimSuffix "-") .Chart.Name }}
{{- end }}
{{- end }}

{{/* Labels by which a component's pods are found: dict "root" $ "component" "gateway". */}}
{{- define "hypergen.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "hypergen.labels" -}}
{{ include "hypergen.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* What an export depends on, short: names its folder. */}}
{{- define "hypergen.exportKey" -}}
{{- $model := omit .Values.model "hubTokenSecret" "lorasClaim" }}
{{- list $model .Values.images.export .Values.gpu.nodeSelector | toJson | sha256sum | trunc 10 }}
{{- end }}

{{/* The folder of the volume that Triton serves. */}}
{{- define "hypergen.folder" -}}
{{- if .Values.export.enabled }}{{ include "hypergen.exportKey" . }}{{ else }}{{ .Values.repository.folder }}{{ end }}
{{- end }}

{{- define "hypergen.claim" -}}
{{- .Values.repository.existingClaim | default (printf "%s-repository" (include "hypergen.name" .)) }}
{{- end }}

{{- define "hypergen.image" -}}
image: {{ printf "%s:%s" .image.repository .image.tag | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
{{- end }}

{{/* What every pod has: no token of the cluster, no root. */}}
{{- define "hypergen.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if .root.Values.security.fixedUsers }}
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "hypergen.container" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where a component's pods run: .Values.gateway or .Values.gpu. */}}
{{- define "hypergen.nodes" -}}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
