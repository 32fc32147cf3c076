{{- define "crossway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select: (list $ "control") */}}
{{- define "crossway.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "crossway.labels" -}}
{{- $root := index . 0 -}}
{{ include "crossway.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "crossway.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "crossway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
# Not at every start: keys are 0600, and what opens them to a group would have them refused.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "crossway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Spread over zones and nodes, without keeping anybody from starting. */}}
{{- define "crossway.spread" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "crossway.selector" (list $root $component) | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Where a pod is put, by the values of its component. */}}
{{- define "crossway.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "crossway.dns" -}}
- to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}}]
  ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end -}}

{{/* The control plane, as a member of the values' component reaches it: (list $ .Values.edge.mesh.control) */}}
{{- define "crossway.control" -}}
{{- $root := index . 0 -}}
{{- index . 1 | default (printf "https://%s-control.%s:%d" (include "crossway.fullname" $root) $root.Release.Namespace (int $root.Values.control.service.port)) -}}
{{- end -}}

{{/* The rule of a NetworkPolicy that lets it there; one that is elsewhere is known by no selector. */}}
{{- define "crossway.toControl" -}}
{{- $root := index . 0 -}}
{{- if index . 1 -}}
- ports: [{protocol: TCP, port: {{ regexFind ":[0-9]+$" (trimSuffix "/" (index . 1)) | trimPrefix ":" | default "443" }}}]
{{- else -}}
- to: [{podSelector: {matchLabels: {{ include "crossway.selector" (list $root "control") | fromYaml | toJson }}}}]
  ports: [{protocol: TCP, port: 9700}]
{{- end -}}
{{- end -}}

{{/* SPIRE: the agent's socket in the pod, and the volume that brings it, as `crossway mesh inject --spire` has them. The folder is mounted, not the
     socket, which is another one after each start of the agent. */}}
{{- define "crossway.agentSocket" -}}
unix:/run/crossway-agent/{{ ternary "spire-agent.sock" (base .Values.spire.agent) (eq .Values.spire.agent "csi") }}
{{- end -}}

{{- define "crossway.agentVolume" -}}
- name: agent
  {{- if hasPrefix "/" .Values.spire.agent }}
  hostPath: {path: {{ dir .Values.spire.agent }}, type: Directory}
  {{- else }}
  csi: {driver: csi.spiffe.io, readOnly: true}
  {{- end }}
{{- end -}}

{{/* The components that have an identity, and the path of each, as JSON. */}}
{{- define "crossway.paths" -}}
{{- $paths := dict -}}
{{- if .Values.control.enabled }}{{ $_ := set $paths "control" "control" }}{{ end -}}
{{- if and .Values.edge.enabled .Values.edge.mesh.enabled }}{{ $_ := set $paths "edge" (printf "service/%s" .Values.edge.mesh.service) }}{{ end -}}
{{- if .Values.gateway.enabled }}{{ $_ := set $paths "gateway" (printf "service/%s" .Values.gateway.mesh.service) }}{{ end -}}
{{- toJson $paths -}}
{{- end -}}

{{- define "crossway.identities" -}}
{{- range $component, $path := include "crossway.paths" . | fromJson }}
  spiffe://TRUST_DOMAIN/{{ $path }}    k8s:ns:{{ $.Release.Namespace }} k8s:sa:{{ include "crossway.fullname" $ }}-{{ $component }} k8s:container-name:{{ $component }}
{{- end }}
{{- end -}}

{{/* Whether pods join by their service accounts: with SPIRE nobody joins. */}}
{{- define "crossway.byToken" -}}
{{- if and .Values.control.kubernetes.enabled (not .Values.spire.enabled) }}yes{{ end -}}
{{- end -}}

{{/* mesh.yaml: what the chart decides goes before what the values say. */}}
{{- define "crossway.mesh" -}}
{{- $said := deepCopy .Values.control.mesh -}}
{{- $control := deepCopy (default (dict) $said.control) -}}
{{- $_ := set $control "bind" "0.0.0.0:9700" -}}
{{- $_ := set $control "probes" "0.0.0.0:9701" -}}
{{- $_ := set $control "admin" "127.0.0.1:9702" -}}
{{- if .Values.spire.enabled -}}
{{- range $key := list "join" "keys" -}}
{{- if hasKey $control $key -}}
{{- fail (printf "control.mesh.control.%s: with spire.enabled nobody joins and nothing is issued here; take it away" $key) -}}
{{- end -}}
{{- end -}}
{{- if .Values.control.kubernetes.services -}}
{{- fail "control.kubernetes.services: with spire.enabled nobody joins by a service account; who is what is SPIRE's to say, in its registration entries" -}}
{{- end -}}
{{- if .Values.control.ca.existingSecret -}}
{{- fail "control.ca.existingSecret: with spire.enabled the authority is SPIRE's; take it away" -}}
{{- end -}}
{{- $_ := set $control "spire" (include "crossway.agentSocket" .) -}}
{{- else -}}
{{- $_ := set $control "ca" (ternary "/var/run/crossway/ca" "/var/lib/crossway/ca" (ne .Values.control.ca.existingSecret "")) -}}
{{- end -}}
{{- $_ := set $control "state" (ternary "/var/lib/crossway/mesh.db" "${file:/etc/crossway-state/url}" (eq .Values.control.state.kind "sqlite")) -}}
{{- $kubernetes := .Values.control.kubernetes -}}
{{- if include "crossway.byToken" . -}}
{{- $services := deepCopy $kubernetes.services -}}
{{- $own := dict -}}
{{- if and .Values.edge.enabled .Values.edge.mesh.enabled -}}
{{- $_ := set $own "edge" .Values.edge.mesh.service -}}
{{- end -}}
{{- if .Values.gateway.enabled -}}
{{- $_ := set $own "gateway" .Values.gateway.mesh.service -}}
{{- end -}}
{{- range $component, $name := $own -}}
{{- $account := printf "%s/%s-%s" $.Release.Namespace (include "crossway.fullname" $) $component -}}
{{- $_ := set $services $name (append (default (list) (get $services $name)) $account | uniq) -}}
{{- end -}}
{{- if not $services -}}
{{- fail "control.kubernetes.services: which service accounts may join as which service? Or set control.kubernetes.enabled: false" -}}
{{- end -}}
{{- $cluster := dict "issuer" $kubernetes.issuer "keys" $kubernetes.keys "audience" $kubernetes.audience "services" $services -}}
{{- if hasPrefix "https://kubernetes.default" $kubernetes.keys -}}
{{- $_ := set $cluster "keys_ca" "/var/run/secrets/crossway-api/ca.crt" -}}
{{- $_ := set $cluster "keys_token" "/var/run/secrets/crossway-api/token" -}}
{{- end -}}
{{- $join := deepCopy (default (dict) $control.join) -}}
{{- $others := $join.kubernetes | default list -}}
{{- $_ := set $join "kubernetes" (concat (list $cluster) (ternary (list $others) $others (kindIs "map" $others))) -}}
{{- $_ := set $control "join" $join -}}
{{- end -}}
{{- $_ := set $said "version" 1 -}}
{{- $_ := set $said "control" $control -}}
{{- toYaml $said -}}
{{- end -}}

{{/* edge.yaml, likewise. */}}
{{- define "crossway.edge" -}}
{{- $said := deepCopy .Values.edge.config -}}
{{- $ways := $said.routes -}}
{{- range $said.listeners }}{{ $ways = or $ways .tcp }}{{ end -}}
{{- if not (and $said.upstreams $ways) -}}
{{- fail "edge.config: an edge needs `upstreams` and `routes` to start; say them, or set edge.enabled: false" -}}
{{- end -}}
{{- $_ := set $said "admin" (dict "bind" "0.0.0.0:9900" "token" "${file:/etc/crossway-admin/token}") -}}
{{- $_ := set $said "workers" (int .Values.edge.workers) -}}
{{- $_ := set $said "drain" (dict "delay" (printf "%ds" (int .Values.edge.drain.delay)) "deadline" (printf "%ds" (int .Values.edge.drain.deadline))) -}}
{{- if .Values.edge.mesh.enabled -}}
{{- $control := include "crossway.control" (list . .Values.edge.mesh.control) -}}
{{- $mesh := dict "service" .Values.edge.mesh.service "control" $control "state" "/var/run/crossway/member" -}}
{{- if .Values.spire.enabled -}}
{{- $_ := set $mesh "spire" (include "crossway.agentSocket" .) -}}
{{- else -}}
{{- $_ := set $mesh "kubernetes" "/var/run/secrets/crossway/token" -}}
{{- $_ := set $mesh "control_ca" "/var/run/secrets/crossway/root.crt" -}}
{{- end -}}
{{- with .Values.edge.mesh.network }}{{ $_ := set $mesh "network" . }}{{ end -}}
{{- $_ := set $said "mesh" $mesh -}}
{{- end -}}
{{- toYaml $said -}}
{{- end -}}
