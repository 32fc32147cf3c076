"""The Helm chart: what it makes is what Kubernetes' schemas and our own loaders take, and holds together. No cluster runs here."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from gateway.config import load
from gateway.config.mesh_load import load_mesh
from gateway.mesh.ca import Ca
from tests.unit.chart import CHART, ChartError, documents, render

POSTGRES = {"control": {"state": {"kind": "postgresql", "postgresql": {"existingSecret": "db", "cidr": "10.0.0.9/32"}}, "ca": {"existingSecret": "authority"}, "replicas": 3}}
EVERYTHING = {
    "image": {"repository": "registry.bank.test/crossway", "digest": "sha256:" + "a" * 64}, "imagePullSecrets": [{"name": "pull"}], "root": {"pem": "-----BEGIN"},
    "control": {
        "mesh": {"services": {"payments": {}}}, "kubernetes": {"services": {"payments": ["shop/payments"]}}, "podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}, "nodeSelector": {"e": "f"},
        "tolerations": [{"key": "g", "operator": "Exists"}], "affinity": {"nodeAffinity": {}}, "priorityClassName": "high",
        "extraVolumes": [{"name": "more", "emptyDir": {}}], "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "service": {"annotations": {"h": "i"}}, "state": {"storageClass": "fast"},
        "networkPolicy": {"monitoring": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 636}]}]},
    },
    "edge": {
        "autoscaling": {"enabled": True}, "priorityClassName": "high", "podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}, "service": {"annotations": {"h": "i"}},
        "extraVolumes": [{"name": "tls", "secret": {"secretName": "tls"}}], "extraVolumeMounts": [{"name": "tls", "mountPath": "/etc/tls"}],
        "ports": [{"name": "https", "port": 443, "containerPort": 8443}, {"name": "http", "port": 80, "containerPort": 8080}],
        "networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "monitoring": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
    },
}  # fmt: skip
ALL: dict[str, dict[str, Any]] = {
    "defaults": {}, "postgresql": POSTGRES, "everything": EVERYTHING, "no edge": {"edge": {"enabled": False}, "control": {"kubernetes": {"services": {"a": ["b/c"]}}}},
    "edge alone": {"control": {"enabled": False}, "edge": {"mesh": {"control": "https://10.0.0.1:9700"}}}, "plain edge": {"control": {"enabled": False}, "edge": {"mesh": {"enabled": False}}},
    "no policies": {"control": {"networkPolicy": {"enabled": False}, "pdb": {"enabled": False}}, "edge": {"networkPolicy": {"enabled": False}, "pdb": {"enabled": False}}},
}  # fmt: skip


@pytest.fixture(params=ALL)
def made(request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, Any]]:
    return documents(ALL[request.param])


def pods(made: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"] for (kind, _), each in made.items() if kind in ("Deployment", "StatefulSet")]


def test_kubernetes_takes_it(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert made
    for data in made.values():
        for version in ("1.31", "1.37"):
            kubernetes_validate.validate(data, version, strict=True)


def test_containers_are_confined(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    for pod in pods(made):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in [*spec.get("initContainers", []), *spec["containers"]]:
            assert each["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert "memory" in each["resources"]["limits"]


def test_what_is_named_is_there(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Volumes that are mounted, ports that are asked for, selectors that select, objects of the chart's own."""
    for pod in pods(made):
        spec, labels = pod["spec"], pod["metadata"]["labels"]
        volumes = {each["name"] for each in spec["volumes"]}
        volumes |= {each["metadata"]["name"] for (kind, _), data in made.items() if kind == "StatefulSet" for each in data["spec"]["volumeClaimTemplates"]}
        for each in [*spec.get("initContainers", []), *spec["containers"]]:
            assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
            ports = {port["name"] for port in each.get("ports", [])}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert each.get(probe, {}).get("httpGet", {}).get("port", next(iter(ports), None)) in ports or not ports
        assert ("ServiceAccount", spec["serviceAccountName"]) in made
        for volume in spec["volumes"]:
            if volume["name"] == "config":
                assert ("ConfigMap", volume["configMap"]["name"]) in made
            if volume["name"] == "admin":
                assert ("Secret", volume["secret"]["secretName"]) in made
        mine = [
            data for (kind, name), data in made.items()
            if kind in ("Service", "PodDisruptionBudget", "NetworkPolicy") and name == spec["serviceAccountName"]
        ]  # fmt: skip
        assert mine
        for data in mine:
            chosen = data["spec"]["selector"] if data["kind"] == "Service" else data["spec"].get("podSelector", data["spec"].get("selector"))["matchLabels"]
            assert chosen.items() <= labels.items()
            if data["kind"] == "Service":
                names = {port["name"] for each in spec["containers"] for port in each["ports"]}
                assert {each["targetPort"] for each in data["spec"]["ports"]} <= names


def test_policies_deny_by_default(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (kind, _), data in made.items():
        if kind == "NetworkPolicy":
            assert data["spec"]["policyTypes"] == ["Ingress", "Egress"]
            for rule in [*data["spec"]["ingress"], *data["spec"]["egress"]]:
                assert rule.get("ports"), "a rule without ports lets everything through"


def test_one_control_plane_has_a_volume_and_several_have_a_database() -> None:
    one = documents()["StatefulSet", "crossway-control"]["spec"]
    assert one["replicas"] == 1 and one["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    several = documents(POSTGRES)["Deployment", "crossway-control"]["spec"]
    assert several["replicas"] == 3 and "volumeClaimTemplates" not in several
    policy = documents(POSTGRES)["NetworkPolicy", "crossway-control"]["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 5432}], "to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}]} in policy


def test_the_control_plane_may_look_whether_members_can_be_reached() -> None:
    policy = documents()["NetworkPolicy", "crossway-control"]["spec"]["egress"]
    assert {"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 9101}]} in policy
    assert "health: 'off'" in documents({"control": {"mesh": {"control": {"health": "off"}}}})["ConfigMap", "crossway-control"]["data"]["mesh.yaml"].replace('"', "'")


def test_the_drain_fits_into_the_grace_period() -> None:
    found = documents({"edge": {"drain": {"delay": 7, "deadline": 50}}})
    assert found["Deployment", "crossway-edge"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 67
    assert "delay: 7s" in found["ConfigMap", "crossway-edge"]["data"]["edge.yaml"]


def test_a_changed_edge_is_a_new_pod_and_a_changed_mesh_is_not() -> None:
    def annotation(values: dict[str, Any]) -> str:
        return str(documents(values)["Deployment", "crossway-edge"]["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert annotation({}) != annotation({"edge": {"workers": 3}})
    before = documents()["StatefulSet", "crossway-control"]
    assert before == documents({"control": {"mesh": {"authorization": {"default": "audit"}}}})["StatefulSet", "crossway-control"]


def placed(text: str, folder: Path) -> str:
    """A configuration with its absolute paths below a folder of ours."""
    return re.sub(r"/(?:etc|var/run|var/lib)/[\w/.-]+", lambda match: str(folder / match[0].rpartition("/")[2]), text)


@pytest.mark.parametrize("values", [{}, POSTGRES, EVERYTHING], ids=["defaults", "postgresql", "everything"])
def test_mesh_yaml_is_a_meshs_file(tmp_path: Path, values: dict[str, Any]) -> None:
    from tests.integration.pki import Authority

    (tmp_path / "ca.crt").write_bytes(Authority("api").pem)
    (tmp_path / "url").write_text("postgresql://crossway:secret@db/mesh")
    (tmp_path / "mesh.yaml").write_text(placed(documents(values)["ConfigMap", "crossway-control"]["data"]["mesh.yaml"], tmp_path))
    mesh = load_mesh(tmp_path / "mesh.yaml")
    assert mesh.control.join is not None
    (cluster,) = mesh.control.join.kubernetes
    assert cluster.services["edge"] == ("mesh/crossway-edge",) and cluster.keys_ca == tmp_path / "ca.crt"
    assert str(mesh.control.bind) == "0.0.0.0:9700" and mesh.control.admin is not None and mesh.control.admin.loopback
    assert mesh.control.state == ("postgresql://crossway:secret@db/mesh" if values is POSTGRES else str(tmp_path / "mesh.db"))


def test_edge_yaml_is_a_gateways_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "root.crt").write_text("")
    config = {"version": 1, "listeners": {"public": {"bind": "0.0.0.0:8080"}}, "upstreams": {"payments": {"service": "payments"}},
              "routes": [{"name": "pay", "match": {"prefix": "/v1/payments"}, "upstream": "payments"}]}  # fmt: skip
    text = documents({"edge": {"config": config}})["ConfigMap", "crossway-edge"]["data"]["edge.yaml"]
    (tmp_path / "edge.yaml").write_text(placed(text, tmp_path))
    loaded = load(tmp_path / "edge.yaml")
    assert loaded.mesh is not None and loaded.mesh.control == "https://crossway-control.mesh:9700" and loaded.mesh.kubernetes == tmp_path / "token"
    assert loaded.drain.delay == 5 and loaded.workers == 2


def test_the_values_in_the_document_make_a_mesh(tmp_path: Path) -> None:
    """docs/kubernetes.md, step 2: what a newcomer copies."""
    from ruamel.yaml import YAML

    from tests.integration.pki import Authority

    text = re.findall(r"^```yaml\n(.*?)^```", (CHART.parents[2] / "docs/kubernetes.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]
    found = documents(YAML(typ="safe").load(text))
    (tmp_path / "ca.crt").write_bytes(Authority("api").pem)
    (tmp_path / "token").write_text("x" * 40)
    for component, file in (("control", "mesh.yaml"), ("edge", "edge.yaml")):
        (tmp_path / file).write_text(placed(found["ConfigMap", f"crossway-{component}"]["data"][file], tmp_path))
    mesh = load_mesh(tmp_path / "mesh.yaml")
    assert set(mesh.services) == {"edge", "payments", "ledger"} and [rule.name for rule in mesh.authorization.rules] == ["edge-to-payments", "payments-to-ledger"]
    assert load(tmp_path / "edge.yaml").upstreams["payments"].service == "payments"


def script(values: dict[str, Any]) -> str:
    made = documents(values)
    (pod,) = [each for each in pods(made) if each["spec"]["serviceAccountName"] == "crossway-control"]
    (first,) = pod["spec"]["initContainers"]
    assert first["command"] == ["/bin/sh", "-euc"]
    return str(first["args"][0])


def test_an_authority_of_a_secret_is_one_that_opens(tmp_path: Path) -> None:
    """The init container's own script, on a folder laid out as the kubelet lays out a Secret."""
    Ca(tmp_path / "made", "cluster.local").open()
    (tmp_path / "made/1/root.key").unlink()  # it is in a safe
    secret = tmp_path / "secret/..2026"
    secret.mkdir(parents=True)
    (secret.parent / "..data").symlink_to("..2026")
    for path in [tmp_path / "made/active", *(tmp_path / "made/1").iterdir()]:
        name = path.name if path.name == "active" else f"1.{path.name}"
        (secret / name).write_bytes(path.read_bytes())
        (secret / name).chmod(0o440)
        (secret.parent / name).symlink_to(f"..data/{name}")
    text = script(POSTGRES).replace("/etc/crossway-ca", str(secret.parent)).replace("/var/run/crossway/ca", str(tmp_path / "ca"))
    for _ in range(2):  # a container that is started again finds what it left
        subprocess.run(["sh", "-euc", text], check=True)
        ca = Ca(tmp_path / "ca", "cluster.local").open(make=False)
        assert ca.active.offline and stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700


def test_a_volume_whose_driver_opened_the_keys_is_put_right(tmp_path: Path) -> None:
    Ca(tmp_path / "ca", "cluster.local").open()
    for folder, _, files in os.walk(tmp_path / "ca"):
        os.chmod(folder, 0o2770)
        for name in files:
            os.chmod(Path(folder, name), 0o660)
    subprocess.run(["sh", "-euc", script({}).replace("/var/lib/crossway/ca", str(tmp_path / "ca"))], check=True)
    Ca(tmp_path / "ca", "cluster.local").open(make=False)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ca").rglob("*.key")} == {0o600}
    # Before the first start there is none.
    subprocess.run(["sh", "-euc", script({}).replace("/var/lib/crossway/ca", str(tmp_path / "none"))], check=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"edge": {"replica": 3}}, "replica"),
        ({"control": {"state": {"kind": "mysql"}}}, "kind"),
        ({"edge": {"config": {"version": 1, "listeners": {}, "admin": {}}}}, "edge/config"),
        ({"edge": {"ports": [{"name": "http", "port": 80, "containerPort": 80}]}}, "containerPort"),
        ({"control": {"kubernetes": {"services": {"payments": ["payments"]}}}}, "services"),
        ({"control": {"mesh": {"control": {"bind": "0.0.0.0:1"}}}}, "control/mesh/control"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"control": {"state": {"kind": "postgresql"}}}, "control.ca.existingSecret"),
        ({"control": {"state": {"kind": "postgresql"}, "ca": {"existingSecret": "x"}}}, "control.state.postgresql.existingSecret"),
        ({"edge": {"enabled": False}}, "which service accounts may join"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ChartError) as error:
        render(values)
    assert said in str(error.value)


def test_the_notes_name_what_there_is() -> None:
    said = render().get("NOTES.txt")
    if said is None:
        pytest.skip("`helm template` does not show the notes; its library does")
    for part in ("https://crossway-control.mesh:9700", "crossway-control-0", "create configmap crossway-root", "crossway mesh inject", "crossway-edge-admin"):
        assert part in said
    assert "{{" not in said


def test_the_chart_is_of_this_version() -> None:
    from gateway import __version__

    assert f'appVersion: "{__version__}"' in (CHART / "Chart.yaml").read_text()
