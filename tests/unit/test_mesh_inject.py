"""Manifests with the mesh put in: what is added, what stays byte for byte, what is refused and where. Judged by Kubernetes' own schemas."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from gateway.cli import main
from gateway.cli.mesh_sidecar import register as register_sidecar
from gateway.errors import ConfigError
from gateway.mesh.inject import DONE, Injection
from tests.integration.processes import PATIENCE, environment

GIVEN = {"control": "https://crossway-control.crossway:9700", "image": "registry.bank.test/crossway:0.1.0"}
VERSIONS = ("1.31", "1.37")

DEPLOYMENT = """\
# payments, as its team wrote it
apiVersion: apps/v1
kind: Deployment
metadata:
  name: payments   # the workload
  namespace: shop
spec:
  replicas: 2
  selector: {matchLabels: {app: payments}}
  template:
    metadata:
      labels: {app: payments, version: "v2"}
    spec:
      serviceAccountName: payments
      securityContext:
        runAsUser: 1000
      containers:
        # the app itself
        - name: app
          image: "registry.bank.test/payments:7"
          envFrom: [{secretRef: {name: payments}}]
          ports:
            - {name: http, containerPort: 8080}
          readinessProbe:
            httpGet: {path: /health, port: http, httpHeaders: [{name: X-Probe, value: "1"}]}
            periodSeconds: 3
          livenessProbe:
            tcpSocket: {port: 8080}
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name:   payments,    namespace: shop}
spec:
    ports: [ {port: 80, targetPort: http} ]
"""


def inject(text: str, **given: Any) -> str:
    return Injection("in.yaml", GIVEN | given).run(text)


def read(text: str) -> list[Any]:
    return [each for each in YAML(typ="safe").load_all(text) if each is not None]


def pod(text: str) -> dict[str, Any]:
    (data,) = read(text)
    for key in ("spec", "jobTemplate", "spec", "template"):
        if data.get("kind") != "Pod" and "containers" not in data.get("spec", {}):
            data = data.get(key, data)
    return dict(data)


def container(text: str, name: str) -> dict[str, Any]:
    spec = pod(text)["spec"]
    return next(each for each in [*spec.get("initContainers", []), *spec["containers"]] if each["name"] == name)


def valid(text: str) -> None:
    for data in read(text):
        for version in VERSIONS:
            kubernetes_validate.validate(data, version, strict=True)


def problems(text: str, **given: Any) -> list[str]:
    injection = Injection("in.yaml", GIVEN | given)
    try:
        injection.run(text)
    except ConfigError as error:
        return [f"{each.place}: {each.message} = {each.hint}" for each in error.problems if each.severity == "error"]
    return []


def test_the_schemas_would_find_a_mistake() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(DEPLOYMENT.replace("replicas: 2", "replicas: two"))
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(DEPLOYMENT.replace("replicas: 2", "replica: 2"))


def test_a_deployment_gets_a_sidecar_and_keeps_what_it_was() -> None:
    made = inject(DEPLOYMENT)
    valid(made)
    assert not re.search(r"[&*]id\d", made)  # nothing is written as an alias
    kept = [line for line in DEPLOYMENT.splitlines() if "httpGet" not in line and "tcpSocket" not in line]
    lines = iter(made.splitlines())
    assert [line for line in kept if line not in lines] == []  # all of them, in order
    spec = pod(made)["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["crossway-intercept", "crossway-sidecar"]
    side = container(made, "crossway-sidecar")
    assert side["restartPolicy"] == "Always" and side["image"] == GIVEN["image"]
    assert side["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 65101, "runAsGroup": 65101, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"}, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {each: side[each]["httpGet"]["path"] for each in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "startupProbe": "/startz", "livenessProbe": "/livez", "readinessProbe": "/readyz",
    }  # fmt: skip
    once = container(made, "crossway-intercept")
    assert once["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]} and "restartPolicy" not in once
    state, join = spec["volumes"]
    assert state["emptyDir"]["medium"] == "Memory"
    assert join["projected"]["sources"][0]["serviceAccountToken"] == {"path": "token", "audience": "crossway", "expirationSeconds": 600}
    assert "volumeMounts" not in container(made, "app")  # the app sees neither the key nor the token
    assert container(made, "app")["lifecycle"] == {"preStop": {"sleep": {"seconds": 3}}}


def test_the_apps_probes_go_through_the_sidecar() -> None:
    made = inject(DEPLOYMENT)
    app, words = container(made, "app"), container(made, "crossway-sidecar")["args"]
    assert app["readinessProbe"] == {"httpGet": {"path": "/app/app-ready", "port": 9104}, "periodSeconds": 3}
    assert app["livenessProbe"] == {"httpGet": {"path": "/app/app-live", "port": 9104}}
    assert words[words.index("app-ready=http:8080/health") - 1] == "--app-probe" and "app-live=tcp:8080" in words
    assert words[words.index("app-ready=X-Probe:1") - 1] == "--app-probe-header"
    # Another port is the app's own business, and so are all of them without interception.
    other = DEPLOYMENT.replace("tcpSocket: {port: 8080}", "httpGet: {path: /, port: 8081}")
    assert container(inject(other), "app")["livenessProbe"] == {"httpGet": {"path": "/", "port": 8081}}
    assert container(inject(DEPLOYMENT, mode="explicit"), "app")["livenessProbe"] == {"tcpSocket": {"port": 8080}}


def test_a_grpc_probe_is_asked_by_the_sidecar_too() -> None:
    for said, asked in (("{port: 8080}", "grpc:8080"), ("{port: 8080, service: bank.Ledger}", "grpc:8080/bank.Ledger")):
        made = inject(replaced("          readinessProbe:", f"          startupProbe: {{grpc: {said}, failureThreshold: 9}}\n          readinessProbe:"))
        valid(made)
        assert container(made, "app")["startupProbe"] == {"httpGet": {"path": "/app/app-start", "port": 9104}, "failureThreshold": 9}
        args = container(made, "crossway-sidecar")["args"]
        assert f"app-start={asked}" in args and parsed(args).app_probe[0][1].port == 8080


def test_a_probes_path_may_lack_its_slash_as_it_may_for_a_kubelet() -> None:
    assert "app-ready=http:8080/health" in container(inject(replaced("path: /health, ", "path: health, ")), "crossway-sidecar")["args"]
    assert "app-ready=http:8080/" in container(inject(replaced("path: /health, ", "")), "crossway-sidecar")["args"]


def test_injecting_twice_changes_nothing() -> None:
    made = inject(DEPLOYMENT + "---\n" + SERVICE)
    assert inject(made) == made
    (said,) = problems(made, **{"drain-delay": "5"})
    line = 1 + next(number for number, text in enumerate(made.splitlines()) if DONE in text)
    assert said.startswith(f"in.yaml:{line}:") and "injected already, with another drain_delay" in said
    damaged = re.sub(rf"^ *{DONE}.*\n", "", made, flags=re.MULTILINE)
    assert "do not belong together" in problems(damaged)[0]


def test_what_makes_no_pods_comes_out_byte_for_byte() -> None:
    strange = "# only a comment\n---\n" + SERVICE + "--- # a remark\napiVersion: example.test/v1\nkind: Deployment\nspec:   {template: {}}\n---\n"
    assert inject(strange) == strange
    both = SERVICE + "---\n" + DEPLOYMENT
    made = inject(both)
    assert made.startswith(SERVICE + "---\n# payments, as its team wrote it\n")
    off = DEPLOYMENT.replace("      labels: {app", '      annotations: {crossway.dev/inject: "disabled"}\n      labels: {app')
    assert inject(off) == off


POD = """\
    spec:
      securityContext: {runAsUser: 1000}
      containers: [{name: app, image: i, ports: [{containerPort: 8080}]}]
"""


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("StatefulSet", "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: ledger}\nspec:\n  serviceName: ledger\n  selector: {matchLabels: {app: l}}\n  template:\n    metadata: {labels: {app: l}}\n"),
        ("DaemonSet", "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: ledger}\nspec:\n  selector: {matchLabels: {app: l}}\n  template:\n    metadata: {labels: {app: l}}\n"),
        ("ReplicaSet", "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: ledger}\nspec:\n  selector: {matchLabels: {app: l}}\n  template:\n    metadata: {labels: {app: l}}\n"),
        ("ReplicationController", "apiVersion: v1\nkind: ReplicationController\nmetadata: {name: ledger}\nspec:\n  selector: {app: l}\n  template:\n    metadata: {labels: {app: l}}\n"),
        ("Job", "apiVersion: batch/v1\nkind: Job\nmetadata: {name: ledger}\nspec:\n  template:\n"),
    ],
)  # fmt: skip
def test_every_kind_that_makes_pods(kind: str, head: str) -> None:
    text = head + POD + ("      restartPolicy: Never\n" if kind == "Job" else "")
    made = inject(text)
    valid(made)
    assert inject(made) == made
    names = [each["name"] for each in pod(made)["spec"]["initContainers"]]
    assert names == ["crossway-intercept", "crossway-sidecar"]
    assert ("lifecycle" in container(made, "app")) == (kind != "Job")  # a job ends by itself
    assert container(made, "crossway-sidecar")["restartPolicy"] == "Always"  # and the sidecar with it, since it is a native one


def test_a_cron_job_that_only_calls_others() -> None:
    text = """\
apiVersion: batch/v1
kind: CronJob
metadata: {name: interest}
spec:
  schedule: "0 2 * * *"
  jobTemplate:
    spec:
      template:
        metadata:
          annotations: {crossway.dev/app-port: none}
        spec:
          restartPolicy: Never
          containers:
          - {name: run, image: i, securityContext: {runAsUser: 1000}}
"""
    made = inject(text)
    valid(made)
    words = container(made, "crossway-sidecar")["args"]
    assert words[words.index("--app") + 1] == "none" and words[words.index("--service") + 1] == "interest"
    assert "--inbound-port" not in container(made, "crossway-intercept")["args"]


def test_a_pod_and_a_list() -> None:
    single = "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec:\n  securityContext: {runAsUser: 7}\n  containers: [{name: a, image: i, ports: [{containerPort: 80}]}]\n"
    valid(inject(single))
    listed = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ConfigMap\n  metadata: {name: c}\n- " + single.replace("\n", "\n  ").rstrip() + "\n"
    first, second = read(inject(listed))[0]["items"]
    assert first == {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    assert [each["name"] for each in second["spec"]["initContainers"]] == ["crossway-intercept", "crossway-sidecar"]
    made = inject(json.dumps(read(single)[0], indent=2))
    assert "crossway-sidecar" in made
    valid(made)


def test_annotations_decide_before_the_command_line() -> None:
    said = {
        "service": "pay", "mode": "explicit", "app-protocol": "grpc", "image": "other:1", "local": "ledger=9201, fraud=9202", "labels": "track=canary",
        "zone": "eu-1a", "inbound-port": "19101", "memory-limit": "1Gi", "drain-delay": "4.5", "log-level": "debug", "root": "our-root", "audience": "mesh",
    }  # fmt: skip
    lines = "".join(f"        crossway.dev/{name}: {json.dumps(value)}\n" for name, value in said.items())
    made = inject(DEPLOYMENT.replace("    metadata:\n      labels", f"    metadata:\n      annotations:\n{lines}      labels"), service="x", zone="y")
    valid(made)
    side = container(made, "crossway-sidecar")
    words = " ".join(side["args"])
    for part in (
        "--service pay ", "--app-protocol grpc", "--local ledger=127.0.0.1:9201 --local fraud=127.0.0.1:9202", "--label track=canary", "--zone eu-1a",
        "--inbound [$(POD_IP)]:19101", "--drain-delay 4.5", "--log-level debug",
    ):  # fmt: skip
        assert part in words
    assert "--intercept" not in words and "crossway-intercept" not in made
    assert side["image"] == "other:1" and side["resources"]["limits"] == {"memory": "1Gi"}
    sources = pod(made)["spec"]["volumes"][1]["projected"]["sources"]
    assert sources[1]["configMap"]["name"] == "our-root" and sources[0]["serviceAccountToken"]["audience"] == "mesh"


def test_the_version_label_is_what_canaries_go_by_and_a_ports_name_the_protocol() -> None:
    words = " ".join(container(inject(DEPLOYMENT.replace("name: http,", "name: grpc-api,").replace("port: http,", "port: 8080,")), "crossway-sidecar")["args"])
    assert "--label version=v2" in words and "--app-protocol grpc" in words


def replaced(old: str, new: str) -> str:
    assert old in DEPLOYMENT
    return DEPLOYMENT.replace(old, new)


def annotated(**said: str) -> str:
    lines = "".join(f"        crossway.dev/{name.replace('_', '-')}: {value}\n" for name, value in said.items())
    return replaced("    metadata:\n      labels", f"    metadata:\n      annotations:\n{lines}      labels")


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (replaced("      serviceAccountName", "      hostNetwork: true\n      serviceAccountName"), "14:7: Deployment payments, spec.template.spec.hostNetwork", "host's network"),
        (replaced("            - {name: http, containerPort: 8080}", "            - {name: udp, containerPort: 53, protocol: UDP}"), "17:7: Deployment payments, spec.template.spec.containers", "no container has a TCP port"),
        (replaced("            - {name: http", "            - {containerPort: 9000}\n            - {name: http"), "17:7: Deployment payments, spec.template.spec.containers", "several ports: 9000, 8080"),
        (replaced("runAsUser: 1000", "runAsGroup: 1000"), "19:11: Deployment payments, spec.template.spec.containers[0]", "which user it runs as is not known"),
        (replaced("runAsUser: 1000", "runAsUser: 65101"), "19:11: Deployment payments, spec.template.spec.containers[0]", "as the sidecar does"),
        (replaced("containerPort: 8080", "containerPort: 9104"), "19:11: Deployment payments, spec.template.spec.containers[0]", "port 9104 is the sidecar's"),
        (replaced("          readinessProbe:", "          startupProbe: {grpc: {port: 8080, service: a b}}\n          readinessProbe:"), "24:45: Deployment payments, spec.template.spec.containers[0].startupProbe.grpc.service", "cannot be asked"),
        (replaced("path: /health, ", "path: /health, scheme: HTTPS, "), "25:13: Deployment payments, spec.template.spec.containers[0].readinessProbe.httpGet", "HTTPS"),
        (replaced("          livenessProbe:", "          lifecycle: {preStop: {httpGet: {port: 8080}}}\n          livenessProbe:"), "27:23: Deployment payments, spec.template.spec.containers[0].lifecycle.preStop", "use exec"),
        (annotated(app_prot='"grpc"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/app-prot", "not known"),
        (annotated(app_port="8080"), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/app-port", "is text"),
        (annotated(app_port='"http"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/app-port", "not a number"),
        (annotated(app_protocol='"soap"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/app-protocol", "none of http1, http2, grpc, tcp"),
        (annotated(exclude_networks='"10.0.0.1/8"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/exclude-networks", "not a network"),
        (annotated(app_uid='"1001"'), "21:11: Deployment payments, spec.template.spec.containers[0]", "crossway.dev/app-uid says 1001"),
        (annotated(service='"Pay Ments"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/service", "not the name of a service"),
        (annotated(local='"ledger=9104"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/local", "port 9104 is taken, by the sidecar (probes-port)"),
        (annotated(local='"ledger=8080"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/local", "port 8080 is taken, by container app"),
        (annotated(local='"ledger=9201,fraud=9201"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/local", "fraud: port 9201 is taken, by ledger"),
        (annotated(local='"ledger=9201,ledger=9202"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/local", "ledger stands there twice"),
        (annotated(local='"db=543"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/local", "from 1024 to 65535"),
        (annotated(zone='"EU 1"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/zone", "not the name of a zone"),
        (annotated(network='"we st"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/network", "not the name of a network"),
        (annotated(advertise='"payments.shop:9101"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/advertise", "neither node nor a numeric address"),
        (annotated(external_certs='"cards=Cards_Cert"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/external-certs", "not HOST=SECRET"),
        (annotated(authorities='"a/b/c"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/authorities", "not CONFIGMAP or CONFIGMAP/KEY"),
        (annotated(egress_audit='"audit/calls.log"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/egress-audit", "the pod has no volume 'audit' = it has: none"),
        (annotated(egress_audit='"/var/log/x"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/egress-audit", "not stdout, stderr or VOLUME/FILE"),
        (annotated(spire='"agent.sock"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/spire", "not csi, csi/NAME.sock or the path"),
        (annotated(join_cert='"bank"', spire='"csi"'), "14:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/spire", "one way to join is enough"),
        (annotated(cpu_limit='"much"'), "13:9: Deployment payments, spec.template.metadata.annotations.crossway.dev/cpu-limit", "not a quantity"),
        (replaced("path: /health, ", 'path: "/a b", '), "25:23: Deployment payments, spec.template.spec.containers[0].readinessProbe.httpGet.path", "cannot be asked"),
        (replaced("name: X-Probe, ", "name: Content-Length, "), "25:64: Deployment payments, spec.template.spec.containers[0].readinessProbe.httpGet.httpHeaders[0]", "this header: Content-Length"),
        (replaced("    metadata:\n      labels", "    metadata:\n      annotations: [a]\n      labels"), "12:7: Deployment payments, spec.template.metadata.annotations", "a mapping is expected here"),
        (replaced("          ports:\n", "          args: [a]\n          ports:\n            - 8080\n"), "24:15: Deployment payments, spec.template.spec.containers[0].ports[0]", "a mapping is expected here"),
        (replaced("runAsUser: 1000", 'runAsUser: "1000"'), "16:9: Deployment payments, spec.template.spec.securityContext.runAsUser", "a number is expected here"),
        (replaced("      containers:", "      os: {name: windows}\n      containers:"), "17:7: Deployment payments, spec.template.spec.os", "no sidecar for Windows"),
        (replaced("      containers:", "      containerz:"), "13:5: Deployment payments, spec.template.spec", "a pod with containers"),
        (replaced("replicas: 2", "replicas: 2\n  replicas: 3"), "9:3", "not YAML: found duplicate key"),
        (replaced("replicas: 2", "replicas: [2"), "9:", "not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_injected_is_told_with_its_place(text: str, place: str, said: str) -> None:
    found = problems(SERVICE + "---\n" + text)
    moved = re.sub(r"^\d+", lambda match: str(int(match[0]) + SERVICE.count("\n") + 1), place)
    assert any(each.startswith(f"in.yaml:{moved}") and said in each for each in found), found


EVERY = {
    "app-protocol": "tcp", "local": "ledger=9201, db=15432", "labels": "track=canary", "zone": "eu-1a", "network": "west", "advertise": "node",
    "external-certs": "cards=cards-client, swift=swift-client", "authorities": "partners/bundle.pem", "egress-audit": "audit/calls.log", "cpu-limit": "500m",
    "drain-delay": "4", "drain-deadline": "50", "log-level": "debug",
}  # fmt: skip


def every(**more: str) -> str:
    lines = "".join(f"        crossway.dev/{name}: {json.dumps(value)}\n" for name, value in (EVERY | more).items())
    text = replaced("    metadata:\n      labels", f"    metadata:\n      annotations:\n{lines}      labels")
    return text + "      volumes:\n        - {name: audit, persistentVolumeClaim: {claimName: audit}}\n"


def parsed(args: list[str]) -> argparse.Namespace:
    """The command line as the product reads it."""
    parser = argparse.ArgumentParser()
    register_sidecar(parser.add_subparsers())
    here = [each.replace("$(POD_IP)", "10.1.2.3").replace("$(NODE_IP)", "10.0.0.9") for each in args]
    return parser.parse_args(here[1:])


def test_every_option_of_a_sidecar_can_be_had_in_a_pod() -> None:
    """Three ways to join are three manifests; a token that is good once has no place in a template, and where the state is is not the pod's to say."""
    used: set[str] = set()
    for more in ({}, {"join-cert": "bank-pki"}, {"spire": "csi"}):
        made = inject(every(**more))
        valid(made)
        assert inject(made) == made
        got = parsed(container(made, "crossway-sidecar")["args"])
        line = "sidecar --service x --app none --inbound 1.1.1.1:1 --outbound 127.0.0.1:1 --control https://127.0.0.1:1 --state x"
        bare = parsed(["mesh", *line.split()])
        used |= {name for name, value in vars(got).items() if value != getattr(bare, name)}
    assert set(vars(bare)) - used == {"token", "run"}
    assert (got.app, got.app_protocol, got.network, got.zone) == (("127.0.0.1", 8080), "tcp", "west", "eu-1a")
    assert dict(got.local) == {"ledger": ("127.0.0.1", 9201), "db": ("127.0.0.1", 15432)} and got.advertise == ("10.0.0.9", 9101)


def test_certificates_towards_external_hosts_are_mounted_in_the_sidecar_only() -> None:
    made = inject(every())
    side, spec = container(made, "crossway-sidecar"), pod(made)["spec"]
    mounts = {each["name"]: each["mountPath"] for each in side["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert set(mounts) == {"crossway-state", "crossway-join", "crossway-external", "crossway-authorities", "audit"} == set(volumes)
    first, second = volumes["crossway-external"]["projected"]["sources"]
    assert first["secret"] == {"name": "cards-client", "items": [{"key": "tls.crt", "path": "cards.crt"}, {"key": "tls.key", "path": "cards.key"}]}
    assert second["secret"]["name"] == "swift-client"
    got = parsed(side["args"])
    for name, kind in (("cards", "crt"), ("swift", "crt")):
        assert dict(got.external_cert)[name] == f"{mounts['crossway-external']}/{name}.{kind}"
        assert dict(got.external_key)[name] == f"{mounts['crossway-external']}/{name}.key"
    assert volumes["crossway-authorities"]["configMap"] == {"name": "partners", "items": [{"key": "bundle.pem", "path": "ca.crt"}]}
    assert {"name": "SSL_CERT_FILE", "value": f"{mounts['crossway-authorities']}/ca.crt"} in side["env"]
    assert got.egress_audit == f"{mounts['audit']}/calls.log"
    assert "volumeMounts" not in container(made, "app") and "volumeMounts" not in container(made, "crossway-intercept")
    assert "crossway-authorities" not in inject(DEPLOYMENT) and "SSL_CERT_FILE" not in inject(DEPLOYMENT)


def test_a_pod_behind_its_nodes_address_has_a_port_there() -> None:
    side = container(inject(every()), "crossway-sidecar")
    assert side["ports"][0] == {"name": "crossway-in", "containerPort": 9101, "hostPort": 9101, "protocol": "TCP"}
    assert {"name": "NODE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}} in side["env"]
    fixed = container(inject(every(advertise="192.0.2.7:443")), "crossway-sidecar")
    assert parsed(fixed["args"]).advertise == ("192.0.2.7", 443) and "hostPort" not in fixed["ports"][0]


def test_other_ways_to_join_bring_what_they_need_and_nothing_else() -> None:
    by_bank = inject(every(**{"join-cert": "bank-pki"}))
    secret, root = next(each for each in pod(by_bank)["spec"]["volumes"] if each["name"] == "crossway-join")["projected"]["sources"]
    assert secret["secret"]["name"] == "bank-pki" and root["configMap"]["name"] == "crossway-root"
    got = parsed(container(by_bank, "crossway-sidecar")["args"])
    assert (got.join_cert, got.join_key) == ("/var/run/secrets/crossway/tls.crt", "/var/run/secrets/crossway/tls.key")
    for spire, volume, file in (
        ("csi", {"csi": {"driver": "csi.spiffe.io", "readOnly": True}}, "spire-agent.sock"),
        ("csi/a.sock", {"csi": {"driver": "csi.spiffe.io", "readOnly": True}}, "a.sock"),
        ("/run/spire/agent/api.sock", {"hostPath": {"path": "/run/spire/agent", "type": "Directory"}}, "api.sock"),
    ):  # fmt: skip
        made = inject(DEPLOYMENT, spire=spire)
        valid(made)
        _, agent = pod(made)["spec"]["volumes"]
        assert agent == {"name": "crossway-agent", **volume}
        assert parsed(container(made, "crossway-sidecar")["args"]).spire == f"unix:/run/crossway-agent/{file}"
        assert "serviceAccountToken" not in made and "crossway-root" not in made.replace(DONE, "").partition("annotations")[0]
    # What is nearer to the pod decides, without a contradiction.
    assert "bank-pki" in inject(annotated(join_cert='"bank-pki"'), spire="csi") and "one way to join" in problems(DEPLOYMENT, spire="csi", **{"join-cert": "a"})[0]


def test_a_limit_of_cpu_is_on_both_containers_and_there_is_none_by_default() -> None:
    for text, cpu in ((every(), "500m"), (DEPLOYMENT, None)):
        made = inject(text)
        for name in ("crossway-sidecar", "crossway-intercept"):
            assert container(made, name)["resources"]["limits"].get("cpu") == cpu


def test_a_ports_name_says_that_it_speaks_tcp() -> None:
    made = inject(DEPLOYMENT.replace("name: http,", "name: tcp-db,").replace("port: http,", "port: tcp-db,"))
    assert parsed(container(made, "crossway-sidecar")["args"]).app_protocol == "tcp"


def test_init_containers_of_the_app_come_after_ours_in_their_order() -> None:
    text = replaced("      containers:", "      initContainers:\n        - {name: migrate, image: m}\n        - {name: warm, image: w}\n      containers:")
    made = inject(text)
    valid(made)
    assert [each["name"] for each in pod(made)["spec"]["initContainers"]] == ["crossway-intercept", "crossway-sidecar", "migrate", "warm"]
    assert inject(made) == made
    explicit = inject(text, mode="explicit")
    assert [each["name"] for each in pod(explicit)["spec"]["initContainers"]] == ["crossway-sidecar", "migrate", "warm"]
    empty = inject(replaced("      containers:", "      initContainers:\n      containers:"))
    assert [each["name"] for each in pod(empty)["spec"]["initContainers"]] == ["crossway-intercept", "crossway-sidecar"]


def test_a_native_sidecar_of_the_app_is_judged_as_its_containers_are() -> None:
    def beside(more: str) -> str:
        return replaced("      containers:", f"      initContainers:\n        - {{name: logs, image: l, restartPolicy: Always{more}}}\n      containers:")

    assert "app as 1000, logs as 2000" in problems(beside(", securityContext: {runAsUser: 2000}"))[0]
    (said,) = problems(beside(", ports: [{containerPort: 9102}]"), **{"app-port": "8080"})
    assert said.startswith("in.yaml:18:11: Deployment payments, spec.template.spec.initContainers[0]: port 9102 is the sidecar's")
    made = inject(beside(", readinessProbe: {httpGet: {path: /ok, port: 8080}}"))
    assert container(made, "logs")["readinessProbe"] == {"httpGet": {"path": "/app/logs-ready", "port": 9104}}


def test_each_document_is_named_and_the_command_line_is_told_once() -> None:
    other = DEPLOYMENT.replace("payments", "ledger").replace("runAsUser: 1000", "runAsUser: 65101")
    listed = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {generateName: batch-, labels: {app: batch}}\n  spec: {hostNetwork: true, containers: [{name: a, image: i, securityContext: {runAsUser: 5}, ports: [{containerPort: 80}]}]}\n"
    first, second = problems(DEPLOYMENT + "---\n" + other + "---\n" + listed)
    assert "Deployment ledger, spec.template.spec.containers[0]: it runs as user 65101" in first
    assert "Pod batch-, items[0].spec.hostNetwork: a pod in the host's network" in second
    (said,) = problems(DEPLOYMENT + "---\n" + DEPLOYMENT.replace("payments", "ledger"), **{"log-level": "loud"})
    assert said.startswith("in.yaml: --log-level: 'loud' is none of")


def test_what_was_injected_by_a_version_that_said_more_or_knew_less_stays() -> None:
    made = inject(DEPLOYMENT)
    said = json.loads(pod(made)["metadata"]["annotations"][DONE])
    assert None not in said.values() and [] not in said.values()  # what is not said is not kept
    before = json.dumps({**said, "zone": None, "local": [], "exclude": []}, sort_keys=True)
    older = made.replace(json.dumps(said, sort_keys=True), before)
    assert older != made and inject(older) == older
    assert "another network" in problems(older, network="west")[0]


def test_several_users_in_a_pod_are_refused_unless_it_is_explicit() -> None:
    two = DEPLOYMENT + "        - {name: second, image: i, securityContext: {runAsUser: 2000}}\n"
    assert "app as 1000, second as 2000" in problems(two)[0]
    assert problems(two, mode="explicit") == []


def test_one_name_is_not_given_to_two_workloads() -> None:
    both = DEPLOYMENT + "---\n" + DEPLOYMENT.replace("payments", "ledger")
    assert problems(both) == []
    assert "is for one workload" in problems(both, service="payments")[0]


def test_all_problems_are_told_at_once() -> None:
    text = replaced("runAsUser: 1000", "runAsGroup: 1").replace("containerPort: 8080", "containerPort: 9101")
    assert len(problems(text)) == 2


def test_doubts_are_warnings() -> None:
    injection = Injection("in.yaml", GIVEN)
    text = replaced("runAsUser: 1000", "runAsUser: 0").replace("      containers:", "      terminationGracePeriodSeconds: 5\n      containers:")
    injection.run(text.replace("          ports:\n", "          lifecycle: {preStop: {exec: {command: [x]}}}\n          ports:\n").replace(
        "containerPort: 8080}", "containerPort: 8080}\n            - {containerPort: 9999}").replace(
        "    metadata:\n      labels", '    metadata:\n      annotations: {crossway.dev/app-port: "8080"}\n      labels'))  # fmt: skip
    said = " ".join(each.message for each in injection.problems)
    for part in ("root", "preStop stays", "5 s are little", "port 9999 stays reachable"):
        assert part in said
    assert {each.severity for each in injection.problems} == {"warning"}


def test_the_redirecting_container_says_what_the_product_takes() -> None:
    words = container(inject(DEPLOYMENT, **{"exclude-ports": "5432,6379", "exclude-networks": "10.9.0.0/16"}), "crossway-intercept")["args"]
    done = subprocess.run([sys.executable, "-m", "gateway", *words, "--print"], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "meta skuid 65101 return" in done.stdout and "{ 53, 5432, 6379 } return" in done.stdout and "dport 8080 redirect to :9101" in done.stdout


def test_the_command_is_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT)
    words = ["mesh", "inject", "-f", str(file), "--control", GIVEN["control"], "--image", GIVEN["image"]]
    monkeypatch.setattr("sys.argv", ["crossway", *words])
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == inject(DEPLOYMENT) and said.err == ""
    file.write_text(replaced("runAsUser: 1000", "runAsGroup: 1000"))
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"{file}:19:11: Deployment payments, spec.template.spec.containers[0]" in said.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SERVICE.encode())))
    assert main(["mesh", "inject"]) == 0
    assert capsys.readouterr().out == SERVICE
    words = ["mesh", "inject", "-f", str(tmp_path / "nothing")]
    assert main(words) == 1


def test_every_option_is_documented() -> None:
    from gateway.cli.mesh_inject import OPTIONS
    from gateway.mesh.inject_read import KNOWN

    text = (Path(__file__).resolve().parents[2] / "docs/kubernetes.md").read_text("utf-8")
    missing = [name for name in KNOWN if f"`{name}`" not in text and name != "injected"]
    assert missing == [] and set(OPTIONS) | {"inject", "injected", "service", "mode"} == set(KNOWN)
