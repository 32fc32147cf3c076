"""The Helm chart: what it makes is what Kubernetes' schemas and our own loaders take, and holds together. No cluster runs here."""

from __future__ import annotations

import argparse
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from gateway.cli.mesh_gateway import register as register_gateway
from gateway.config import load
from gateway.config.mesh_load import load_mesh
from gateway.mesh.ca import Ca
from tests.unit.chart import CHART, ChartError, documents, merged, render, sensible

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
NETWORKS = {"services": {"edge": {}, "gateway": {}}, "networks": {"west": {"gateway": "gateway"}, "east": {"gateway": "gateway"}}, "control": {"network": "west"}}
GATEWAY: dict[str, Any] = {"control": {"mesh": NETWORKS}, "gateway": {"enabled": True, "mesh": {"network": "west", "advertise": "192.0.2.10:443"}}}
FAR: dict[str, Any] = {
    "control": {"enabled": False}, "edge": {"enabled": False},
    "gateway": {
        "enabled": True, "mesh": {"network": "east", "service": "door", "control": "https://192.0.2.10:9700", "advertise": "[2001:db8::7]:9443"}, "replicas": 3, "drain": {"delay": 7, "deadline": 50},
        "service": {"port": 443, "annotations": {"a": "b"}, "loadBalancerClass": "example.test/lb", "loadBalancerSourceRanges": ["192.0.2.0/24"]}, "podAnnotations": {"c": "d"}, "podLabels": {"e": "f"},
        "nodeSelector": {"g": "h"}, "tolerations": [{"key": "i", "operator": "Exists"}], "affinity": {"nodeAffinity": {}}, "priorityClassName": "high", "logLevel": "debug",
        "networkPolicy": {"clients": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "monitoring": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
    },
}  # fmt: skip
SPIRE: dict[str, Any] = merged(GATEWAY, {"spire": {"enabled": True}})
SPIRE_ON_NODES: dict[str, Any] = {
    "spire": {"enabled": True, "agent": "/run/spire/agent/api.sock", "clusterSPIFFEIDs": {"enabled": True, "className": "spire-mgmt-spire"}},
    "control": {"state": {"kind": "postgresql", "postgresql": {"existingSecret": "db"}}},
}  # fmt: skip
ALL: dict[str, dict[str, Any]] = {
    "defaults": {}, "postgresql": POSTGRES, "everything": EVERYTHING, "no edge": {"edge": {"enabled": False}, "control": {"kubernetes": {"services": {"a": ["b/c"]}}}},
    "edge alone": {"control": {"enabled": False}, "edge": {"mesh": {"control": "https://10.0.0.1:9700"}}}, "plain edge": {"control": {"enabled": False}, "edge": {"mesh": {"enabled": False}}},
    "no policies": {"control": {"networkPolicy": {"enabled": False}, "pdb": {"enabled": False}}, "edge": {"networkPolicy": {"enabled": False}, "pdb": {"enabled": False}}},
    "a gateway": GATEWAY, "a gateway alone": FAR, "spire": SPIRE, "spire on nodes": SPIRE_ON_NODES, "an edge alone with spire": {"control": {"enabled": False}, "edge": {"mesh": {"control": "https://10.0.0.1:9700"}}, "spire": {"enabled": True}},
}  # fmt: skip


@pytest.fixture(params=ALL)
def made(request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, Any]]:
    return documents(ALL[request.param])


def pods(made: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"] for (kind, _), each in made.items() if kind in ("Deployment", "StatefulSet")]


def test_kubernetes_takes_it(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert made
    for data in made.values():
        if data["apiVersion"] == "spire.spiffe.io/v1alpha1":  # SPIRE's own, of which Kubernetes knows nothing: judged below
            continue
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


def words(made: dict[tuple[str, str], dict[str, Any]]) -> argparse.Namespace:
    """The gateway's command line as the product reads it."""
    parser = argparse.ArgumentParser()
    register_gateway(parser.add_subparsers())
    (each,) = made["Deployment", "crossway-gateway"]["spec"]["template"]["spec"]["containers"]
    return parser.parse_args([word.replace("$(POD_IP)", "10.1.2.3") for word in each["args"]][1:])


def test_a_gateway_is_what_its_command_takes_and_its_service_leads_to() -> None:
    made = documents(FAR)
    got = words(made)
    assert (got.network, got.service, got.control, got.advertise) == ("east", "door", "https://192.0.2.10:9700", ("2001:db8::7", 9443))
    assert (got.join_kubernetes, got.control_ca) == ("/var/run/secrets/crossway/token", "/var/run/secrets/crossway/root.crt")
    pod = made["Deployment", "crossway-gateway"]["spec"]["template"]["spec"]
    ports = {each["name"]: each["containerPort"] for each in pod["containers"][0]["ports"]}
    assert got.bind == ("10.1.2.3", ports["mesh"]) and got.probes == ("10.1.2.3", ports["probes"]) and pod["terminationGracePeriodSeconds"] == 67
    service = made["Service", "crossway-gateway"]["spec"]
    assert service["type"] == "LoadBalancer" and service["ports"] == [{"name": "mesh", "port": 443, "targetPort": "mesh", "protocol": "TCP"}]
    policy = made["NetworkPolicy", "crossway-gateway"]["spec"]
    assert policy["ingress"][0] == {"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"protocol": "TCP", "port": ports["mesh"]}]}
    assert {"ports": [{"protocol": "TCP", "port": 9700}]} in policy["egress"] and {"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 9101}]} in policy["egress"]
    assert made["PodDisruptionBudget", "crossway-gateway"]["spec"]["maxUnavailable"] == 1


def test_the_control_plane_of_a_gateways_release_lets_it_join_and_looks_at_it(tmp_path: Path) -> None:
    from tests.integration.pki import Authority

    made = documents(GATEWAY)
    assert words(made).control == "https://crossway-control.mesh:9700"
    (tmp_path / "ca.crt").write_bytes(Authority("api").pem)
    (tmp_path / "mesh.yaml").write_text(placed(made["ConfigMap", "crossway-control"]["data"]["mesh.yaml"], tmp_path))
    mesh = load_mesh(tmp_path / "mesh.yaml")
    assert mesh.control.join is not None and mesh.control.join.kubernetes[0].services["gateway"] == ("mesh/crossway-gateway",)
    egress = made["NetworkPolicy", "crossway-control"]["spec"]["egress"]
    assert {"to": [{"ipBlock": {"cidr": "192.0.2.10/32"}}], "ports": [{"protocol": "TCP", "port": 443}]} in egress
    assert any(each.get("ports") == [{"protocol": "TCP", "port": 9443}] for each in egress)
    six = documents({**GATEWAY, "gateway": {"enabled": True, "mesh": {"network": "west", "advertise": "[2001:db8::7]:9443"}}})
    assert {"ipBlock": {"cidr": "2001:db8::7/128"}} in [to for each in six["NetworkPolicy", "crossway-control"]["spec"]["egress"] for to in each.get("to", [])]


@pytest.mark.parametrize("listed", [True, False])
def test_further_clusters_join_beside_the_charts_own(tmp_path: Path, listed: bool) -> None:
    from tests.integration.pki import Authority

    (tmp_path / "ca.crt").write_bytes(Authority("api").pem)
    (tmp_path / "east.json").write_text('{"keys": []}')
    east: dict[str, Any] = {"issuer": "https://east.bank.test", "keys": "/etc/east/east.json", "services": {"gateway": ["crossway/crossway-gateway"]}}
    mesh = merged(NETWORKS, {"control": {"join": {"kubernetes": [east] if listed else east}}})
    text = documents(merged(GATEWAY, {"control": {"mesh": mesh}}))["ConfigMap", "crossway-control"]["data"]["mesh.yaml"]
    (tmp_path / "mesh.yaml").write_text(placed(text, tmp_path))
    join = load_mesh(tmp_path / "mesh.yaml").control.join
    assert join is not None and [each.services["gateway"] for each in join.kubernetes] == [("mesh/crossway-gateway",), ("crossway/crossway-gateway",)]


def test_a_gateway_waits_for_its_address() -> None:
    values = {"control": {"mesh": NETWORKS}, "gateway": {"enabled": True, "mesh": {"network": "west"}}}
    made = documents(values)
    assert ("Service", "crossway-gateway") in made and ("Deployment", "crossway-gateway") not in made
    assert ("Service", "crossway-gateway") not in documents(), "nobody asked for one"
    said = render(sensible(values)).get("NOTES.txt")
    if said is not None:  # `helm template` does not show the notes; its library does
        assert "get service crossway-gateway" in said and "gateway.mesh.advertise=ADDRESS:9443" in said


def test_an_edge_may_reach_a_control_plane_that_is_elsewhere() -> None:
    policy = documents(ALL["edge alone"])["NetworkPolicy", "crossway-edge"]["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 9700}]} in policy
    policy = documents({"control": {"enabled": False}, "edge": {"mesh": {"control": "https://mesh.bank.test"}}})["NetworkPolicy", "crossway-edge"]["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 443}]} in policy


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


def test_the_authority_of_a_host_outside_is_mounted_in_the_control_plane(tmp_path: Path) -> None:
    from tests.integration.pki import Authority

    external = {"cards": {"hosts": ["api.cards.example"], "tls": {"ca": "/etc/partners/cards.pem"}}}
    control = {"mesh": {"external": external}, "extraVolumes": [{"name": "partners", "configMap": {"name": "partners"}}], "extraVolumeMounts": [{"name": "partners", "mountPath": "/etc/partners"}]}
    made = documents({"control": control})
    (each,) = made["StatefulSet", "crossway-control"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "partners", "mountPath": "/etc/partners"} in each["volumeMounts"]
    for name in ("ca.crt", "cards.pem"):
        (tmp_path / name).write_bytes(Authority("cards").pem)
    (tmp_path / "mesh.yaml").write_text(placed(made["ConfigMap", "crossway-control"]["data"]["mesh.yaml"], tmp_path))
    assert load_mesh(tmp_path / "mesh.yaml").external["cards"].tls.ca == tmp_path / "cards.pem"


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


def test_the_networks_in_the_document_make_a_gateway(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "root.crt").write_text("")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (CHART.parents[2] / "docs/kubernetes.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    first, second = (YAML(typ="safe").load(each) for each in (blocks[0], next(each for each in blocks if "gateway:\n" in each)))
    made = documents(merged(merged(first, second), {"gateway": {"mesh": {"advertise": "192.0.2.10:9443"}}}))
    assert words(made).network == "west"
    for data in made.values():
        kubernetes_validate.validate(data, "1.37", strict=True)
    (tmp_path / "edge.yaml").write_text(placed(made["ConfigMap", "crossway-edge"]["data"]["edge.yaml"], tmp_path))
    mesh = load(tmp_path / "edge.yaml").mesh
    assert mesh is not None and mesh.network == "west"


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
        ({"gateway": {"enabled": True}}, "gateway"),
        ({"gateway": {"enabled": True, "mesh": {"network": "west", "advertise": "lb.bank.test:443"}}}, "advertise"),
        ({"gateway": {"enabled": True, "mesh": {"network": "west"}}}, "control.mesh.services: gateway is missing"),
        ({"gateway": {"enabled": True, "mesh": {"network": "west"}}, "control": {"mesh": {"services": {"gateway": {}}}}}, "{west: {gateway: gateway}}"),
        ({"gateway": {"enabled": True, "mesh": {"network": "west"}}, "control": {"enabled": False}}, "gateway.mesh.control"),
        ({"edge": {"enabled": False}}, "which service accounts may join"),
        ({"spire": {"enabled": True, "agent": "spire-agent.sock"}}, "agent"),
        ({"spire": {"enabled": True, "agent": "/agent.sock"}}, "agent"),
        ({"spire": {"enabled": True, "socket": "/run/agent.sock"}}, "socket"),
        ({"spire": {"enabled": True}, "root": {"pem": "-----BEGIN"}}, "root.pem: with spire.enabled the roots are SPIRE's"),
        ({"spire": {"enabled": True}, "control": {"ca": {"existingSecret": "authority"}}}, "control.ca.existingSecret: with spire.enabled"),
        ({"spire": {"enabled": True}, "control": {"kubernetes": {"services": {"payments": ["shop/payments"]}}}}, "control.kubernetes.services: with spire.enabled"),
        ({"spire": {"enabled": True}, "control": {"mesh": {"control": {"join": {"ca": "/a", "services": {"a": ["*.b"]}}}}}}, "control.mesh.control.join: with spire.enabled"),
        ({"control": {"mesh": {"control": {"spire": "env"}}}}, "control/mesh/control"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ChartError) as error:
        render(sensible(values))
    assert said in str(error.value)


@pytest.mark.parametrize("config", [{}, {"upstreams": {"a": {"targets": ["a:1"]}}}, {"routes": [{"name": "a", "match": {"prefix": "/"}, "upstream": "a"}]}])
def test_an_edge_that_would_not_start_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ChartError, match="edge.config"):
        render({"edge": {"config": config}})


def test_an_edge_of_raw_tcp_needs_no_routes(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    (tmp_path / "token").write_text("x" * 40)
    listeners = {"public": {"bind": "0.0.0.0:5432", "tcp": {"upstream": "db"}}}
    values = {"control": {"enabled": False}, "edge": {"mesh": {"enabled": False}, "config": {"listeners": listeners, "upstreams": {"db": {"targets": ["10.0.0.1:5432"]}}}}}
    (made,) = [each for each in YAML(typ="safe").load_all(render(values)["edge-parts.yaml"]) if each and each["kind"] == "ConfigMap"]
    (tmp_path / "edge.yaml").write_text(placed(made["data"]["edge.yaml"], tmp_path))
    assert load(tmp_path / "edge.yaml").listeners["public"].tcp is not None


def test_the_notes_name_what_there_is() -> None:
    said = render(sensible({})).get("NOTES.txt")
    if said is None:
        pytest.skip("`helm template` does not show the notes; its library does")
    for part in ("https://crossway-control.mesh:9700", "crossway-control-0", "create configmap crossway-root", "crossway mesh inject", "crossway-edge-admin"):
        assert part in said
    assert "{{" not in said


def test_the_chart_is_of_this_version() -> None:
    from gateway import __version__

    assert f'appVersion: "{__version__}"' in (CHART / "Chart.yaml").read_text()
