{{- define "unet.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "unet.selector" -}}
app.kubernetes.io/name: unet-serve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "unet.labels" -}}
{{ include "unet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- /* Milliseconds that a request of this release waits, by Prometheus; nothing asked for is no wait. */ -}}
{{- define "unet.queueMs" -}}
sum(rate(nv_inference_queue_duration_us{namespace="{{ .Release.Namespace }}",service="{{ include "unet.name" . }}"}[1m])) / clamp_min(sum(rate(nv_inference_request_success{namespace="{{ .Release.Namespace }}",service="{{ include "unet.name" . }}"}[1m])), 0.001) / 1000
{{- end -}}
