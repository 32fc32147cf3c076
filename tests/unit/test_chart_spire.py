"""The Helm chart where identities come from SPIRE: its pods ask the agent as injected ones do, and hold nothing else. No cluster runs here."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gateway.cli.mesh_sidecar import register as register_sidecar
from gateway.config import load
from gateway.config.mesh_load import load_mesh
from gateway.mesh.inject_pod import AGENT, AGENT_AT, Options, sidecar, volumes
from gateway.mesh.spiffe import control_id
from tests.unit.chart import CHART, documents, merged, render, sensible
from tests.unit.test_chart import FAR, GATEWAY, SPIRE, SPIRE_ON_NODES, placed, pods, words


@pytest.mark.parametrize(("values", "said"), [(SPIRE, "csi"), (merged(SPIRE, {"spire": {"agent": "csi/a.sock"}}), "csi/a.sock"), (merged(SPIRE, SPIRE_ON_NODES), "/run/spire/agent/api.sock")])
def test_with_spire_all_ask_the_agent_by_the_volume_that_inject_gives_and_hold_nothing_else(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    injected = Options("a", "https://a:1", "i", 1, spire="csi/spire-agent.sock" if said == "csi" else said)
    (volume,) = [each for each in volumes(injected) if each["name"] == AGENT]
    address = parsed_sidecar(injected).spire
    made = documents(values)
    for component in ("control", "edge", "gateway"):
        (pod,) = [each["spec"] for each in pods(made) if each["spec"]["serviceAccountName"] == f"crossway-{component}"]
        (got,) = [each for each in pod["volumes"] if each["name"] == "agent"]
        assert {**got, "name": AGENT} == volume
        (container,) = pod["containers"]
        assert {"name": "agent", "mountPath": AGENT_AT, "readOnly": True} in container["volumeMounts"]
        assert "initContainers" not in pod, "there is no authority to put right"
        held = {key for each in pod["volumes"] for key in each} - {"name", "emptyDir", "csi", "hostPath", "configMap"}
        assert held <= {"secret"} and {each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each} <= {"crossway-edge-admin", "db"}
    assert not re.search("serviceAccountToken|crossway-root|crossway-api|join", json.dumps([*made.values()]))
    assert words(made).spire == address and words(made).join_kubernetes is None
    (tmp_path / "url").write_text("postgresql://crossway:secret@db/mesh")
    (tmp_path / "token").write_text("x" * 40)
    for component, file in (("control", "mesh.yaml"), ("edge", "edge.yaml")):
        (tmp_path / file).write_text(placed(made["ConfigMap", f"crossway-{component}"]["data"][file], tmp_path))
    mesh, edge = load_mesh(tmp_path / "mesh.yaml"), load(tmp_path / "edge.yaml").mesh
    assert mesh.control.spire == address and mesh.control.join is None
    assert edge is not None and edge.spire == address and edge.kubernetes is edge.control_ca is None


def parsed_sidecar(options: Options) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    register_sidecar(parser.add_subparsers())
    return parser.parse_args([word.replace("$(POD_IP)", "10.1.2.3") for word in sidecar(options)["args"]][1:])


def test_spire_changes_neither_probes_nor_policies() -> None:
    """But for the API server, whose keys nobody asks for when no pod joins by its token."""
    with_it, without = documents(SPIRE), documents(GATEWAY)
    for key, data in without.items():
        if key[0] == "NetworkPolicy":
            rules = [each for each in data["spec"]["egress"] if {"protocol": "TCP", "port": 6443} not in each["ports"]]
            assert with_it[key]["spec"] == {**data["spec"], "egress": rules} and (len(rules) < len(data["spec"]["egress"])) == (key[1] == "crossway-control")
        if key[0] in ("Deployment", "StatefulSet"):
            (now,), (before,) = (each["spec"]["template"]["spec"]["containers"] for each in (with_it[key], data))
            for name in ("startupProbe", "livenessProbe", "readinessProbe", "ports", "securityContext"):
                assert now[name] == before[name]


def test_spires_controller_manager_is_told_who_the_pods_are() -> None:
    made = documents(merged(merged(FAR, {"control": {"enabled": True, "mesh": {"services": {"door": {}}, "networks": {"east": {"gateway": "door"}}}}, "edge": {"enabled": True}}), {"spire": {"enabled": True, "clusterSPIFFEIDs": {"enabled": True}}}))
    identities = {name: data["spec"] for (kind, name), data in made.items() if kind == "ClusterSPIFFEID"}
    assert set(identities) == {"mesh-crossway-control", "mesh-crossway-edge", "mesh-crossway-gateway"}
    for component, identity in (("control", control_id("bank.test")), ("edge", "spiffe://bank.test/service/edge"), ("gateway", "spiffe://bank.test/service/door")):
        spec = identities[f"mesh-crossway-{component}"]
        assert set(spec) == {"spiffeIDTemplate", "namespaceSelector", "podSelector", "workloadSelectorTemplates"}
        assert spec["spiffeIDTemplate"].replace("{{ .TrustDomain }}", "bank.test") == identity
        assert spec["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "mesh"}}
        (pod,) = [each for each in pods(made) if each["spec"]["serviceAccountName"] == f"crossway-{component}"]
        assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert spec["workloadSelectorTemplates"] == [f"k8s:sa:crossway-{component}", f"k8s:container-name:{pod['spec']['containers'][0]['name']}"]
    named = documents(SPIRE_ON_NODES)
    assert {data["spec"]["className"] for (kind, _), data in named.items() if kind == "ClusterSPIFFEID"} == {"spire-mgmt-spire"}
    assert not [kind for kind, _ in documents(SPIRE) if kind == "ClusterSPIFFEID"], "SPIRE without its controller manager does not know the kind"


def test_the_notes_name_who_has_to_be_registered() -> None:
    said, told = render(sensible(SPIRE)).get("NOTES.txt"), render(sensible(SPIRE_ON_NODES)).get("NOTES.txt")
    if said is None or told is None:
        pytest.skip("`helm template` does not show the notes; its library does")
    assert "spiffe://TRUST_DOMAIN/control    k8s:ns:mesh k8s:sa:crossway-control k8s:container-name:control\n" in said
    assert "/service/edge " in said and "/service/gateway " in said and "--spire csi <" in said and "root.crt" not in said and "service account" not in said
    assert "ClusterSPIFFEIDs" in told and "TRUST_DOMAIN" not in told and "--spire /run/spire/agent/api.sock <" in told


def test_the_values_for_spire_in_the_document_make_a_mesh(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (CHART.parents[2] / "docs/kubernetes.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    first, spire = (YAML(typ="safe").load(each) for each in (blocks[0], next(each for each in blocks if each.startswith("spire:"))))
    first["control"].pop("kubernetes")  # as the document says
    made = documents(merged(first, spire))
    (tmp_path / "mesh.yaml").write_text(placed(made["ConfigMap", "crossway-control"]["data"]["mesh.yaml"], tmp_path))
    assert load_mesh(tmp_path / "mesh.yaml").control.spire == "unix:/run/crossway-agent/spire-agent.sock"
