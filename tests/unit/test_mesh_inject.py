"""Manifests with the mesh put in: what is added, what stays byte for byte, what is refused and where. Judged by Kubernetes' own schemas."""

from __future__ import annotations

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
        (replaced("      serviceAccountName", "      hostNetwork: true\n      serviceAccountName"), "14:7: spec.template.spec.hostNetwork", "host's network"),
        (replaced("            - {name: http, containerPort: 8080}", "            - {name: udp, containerPort: 53, protocol: UDP}"), "17:7: spec.template.spec.containers", "no container has a TCP port"),
        (replaced("            - {name: http", "            - {containerPort: 9000}\n            - {name: http"), "17:7: spec.template.spec.containers", "several ports: 9000, 8080"),
        (replaced("runAsUser: 1000", "runAsGroup: 1000"), "19:11: spec.template.spec.containers[0]", "which user it runs as is not known"),
        (replaced("runAsUser: 1000", "runAsUser: 65101"), "19:11: spec.template.spec.containers[0]", "as the sidecar does"),
        (replaced("containerPort: 8080", "containerPort: 9104"), "19:11: spec.template.spec.containers[0]", "port 9104 is the sidecar's"),
        (replaced("          readinessProbe:", "          startupProbe: {grpc: {port: 8080}}\n          readinessProbe:"), "24:11: spec.template.spec.containers[0].startupProbe", "takes members only"),
        (replaced("path: /health, ", "path: /health, scheme: HTTPS, "), "25:13: spec.template.spec.containers[0].readinessProbe.httpGet", "HTTPS"),
        (replaced("          livenessProbe:", "          lifecycle: {preStop: {httpGet: {port: 8080}}}\n          livenessProbe:"), "27:23: spec.template.spec.containers[0].lifecycle.preStop", "use exec"),
        (annotated(app_prot='"grpc"'), "13:9: spec.template.metadata.annotations.crossway.dev/app-prot", "not known"),
        (annotated(app_port="8080"), "13:9: spec.template.metadata.annotations.crossway.dev/app-port", "is text"),
        (annotated(app_port='"http"'), "13:9: spec.template.metadata.annotations.crossway.dev/app-port", "not a number"),
        (annotated(app_protocol='"soap"'), "13:9: spec.template.metadata.annotations.crossway.dev/app-protocol", "none of http1, http2, grpc"),
        (annotated(exclude_networks='"10.0.0.1/8"'), "13:9: spec.template.metadata.annotations.crossway.dev/exclude-networks", "not a network"),
        (annotated(app_uid='"1001"'), "21:11: spec.template.spec.containers[0]", "crossway.dev/app-uid says 1001"),
        (annotated(service='"Pay Ments"'), "13:9: spec.template.metadata.annotations.crossway.dev/service", "not the name of a service"),
        (replaced("      containers:", "      containerz:"), "13:5: spec.template.spec", "a pod with containers"),
        (replaced("replicas: 2", "replicas: 2\n  replicas: 3"), "9:3", "not YAML: found duplicate key"),
        (replaced("replicas: 2", "replicas: [2"), "9:", "not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_injected_is_told_with_its_place(text: str, place: str, said: str) -> None:
    found = problems(SERVICE + "---\n" + text)
    moved = re.sub(r"^\d+", lambda match: str(int(match[0]) + SERVICE.count("\n") + 1), place)
    assert any(each.startswith(f"in.yaml:{moved}") and said in each for each in found), found


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
    assert said.out == "" and f"{file}:19:11: spec.template.spec.containers[0]" in said.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SERVICE.encode())))
    assert main(["mesh", "inject"]) == 0
    assert capsys.readouterr().out == SERVICE
    words = ["mesh", "inject", "-f", str(tmp_path / "nothing")]
    assert main(words) == 1


def test_every_option_is_documented() -> None:
    from gateway.cli.mesh_inject import OPTIONS
    from gateway.mesh.inject_app import KNOWN

    text = (Path(__file__).resolve().parents[2] / "docs/kubernetes.md").read_text("utf-8")
    missing = [name for name in KNOWN if f"`{name}`" not in text and name != "injected"]
    assert missing == [] and set(OPTIONS) <= set(KNOWN)
