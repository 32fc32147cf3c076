"""Joining as a pod of Kubernetes: a key of ours stands for the cluster's; control plane, sidecar and edge are real processes."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from ruamel.yaml import YAML

from gateway.mesh.inject import Injection
from tests.integration.control_kit import FILE, ControlProcess, make_request, post, serial_of
from tests.integration.control_kit import Member as PlainMember
from tests.integration.mesh_kit import Control, Sidecar, free_port
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, Gateway, environment, eventually, request
from tests.integration.test_mesh_whole import app, call

__all__ = ["app"]

ISSUER = "https://kubernetes.default.svc.cluster.local"
JOIN = """  join:
    kubernetes:
      issuer: https://kubernetes.default.svc.cluster.local
      keys: jwks.json
      services: {payments: [shop/payments], ledger: [books/ledger, books/ledger-batch], edge: front/edge}
"""


class Cluster:
    """What signs tokens: one key, published in jwks.json."""

    def __init__(self, folder: Path, kid: str = "one") -> None:
        self.folder, self.kid = folder, kid
        self.key = rsa.generate_private_key(65537, 2048)

    def publish(self) -> None:
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        fresh = self.folder / "jwks.new"
        fresh.write_text(json.dumps({"keys": [{**public, "kid": self.kid, "alg": "RS256", "use": "sig"}]}))
        fresh.rename(self.folder / "jwks.json")

    def token(self, account: str = "shop/payments", pod: str = "payments-7d9f-x2", uid: str = "0b1c2d3e-0000-4000-8000-000000000001", **changed: Any) -> str:
        """A token as an API server makes it; `changed` claims replace its own, None removes."""
        namespace, _, name = account.partition("/")
        now = int(time.time())
        claims = {
            "aud": ["crossway"], "iss": ISSUER, "exp": now + 600, "iat": now, "nbf": now, "jti": "3f0c",
            "sub": f"system:serviceaccount:{namespace}:{name}",
            "kubernetes.io": {
                "namespace": namespace, "node": {"name": "n1", "uid": "11111111-0000"}, "pod": {"name": pod, "uid": uid},
                "serviceaccount": {"name": name, "uid": "22222222-0000"},
            },
            **changed,
        }  # fmt: skip
        return jwt.encode({key: value for key, value in claims.items() if value is not None}, self.key, "RS256", {"kid": self.kid, "typ": None})

    def file(self, *account: str, **more: Any) -> Path:
        text = self.token(*account, **more)
        path = self.folder / f"pod-{len(list(self.folder.glob('pod-*')))}.token"
        path.write_text(text)
        return path


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    made = Cluster(tmp_path)
    made.publish()
    return made


@pytest.fixture
def control(tmp_path: Path, cluster: Cluster) -> Iterator[ControlProcess]:
    with ControlProcess(tmp_path, control=JOIN) as process:
        yield process


def join(control: ControlProcess, token: str, service: str = "payments", instance: str = "payments-7d9f-x2-0b1c2d3e") -> tuple[int, dict[str, Any]]:
    said = {"kubernetes": token, "service": service, "csr": make_request()[0], "instance": instance, "inbound": "10.1.2.3:9101", "labels": {}}
    return post(control, "/v1/join", said)


def pod_options(control: ControlProcess, token: Path) -> tuple[str, ...]:
    return ("--join-kubernetes", str(token), "--control-ca", str(control.folder / "ca/1/root.crt"))


def test_a_pod_gets_the_certificate_of_its_service(control: ControlProcess, cluster: Cluster) -> None:
    status, answer = join(control, cluster.token())
    assert status == 200, answer
    member = PlainMember(control, "payments")
    member.svid = answer["svid"]
    assert "spiffe://bank.test/service/payments" in str(member.leaf.extensions)
    row = next(each for each in control.logged("a certificate is issued") if each["serial"] == serial_of(member))
    assert row["how"] == "kubernetes" and row["instance"] == "payments-7d9f-x2-0b1c2d3e"
    # The answer was lost, or the pod's container began anew: the same pod may ask again.
    assert join(control, cluster.token())[0] == 200


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"aud": ["https://kubernetes.default.svc"]}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"iss": "https://other"}, "another issuer"),
        ({"exp": int(time.time()) - 3600}, "expired"),
        ({"exp": None}, "lacks a claim"),
        ({"iat": int(time.time()) + 86400}, "in the future"),
        ({"exp": int(time.time()) + 400 * 86400}, "lives longer"),
        ({"kubernetes.io": {"namespace": "shop", "serviceaccount": {"name": "payments", "uid": "2"}}}, "bound to no pod"),
        ({"kubernetes.io": None}, "bound to no pod"),
        ({"sub": "system:serviceaccount:shop:admin"}, "not the service account"),
    ],
)
def test_a_token_that_proves_no_pod_is_refused(control: ControlProcess, cluster: Cluster, changed: dict[str, Any], said: str) -> None:
    status, answer = join(control, cluster.token(**changed))
    assert status == 403 and said in answer["error"], answer


def test_a_service_account_joins_as_what_it_is_listed_for(control: ControlProcess, cluster: Cluster) -> None:
    for account, service, expected in (
        ("shop/payments", "ledger", 403), ("shop/other", "payments", 403), ("other/payments", "payments", 403), ("books/ledger-batch", "ledger", 200),
        ("shop/payments", "nothing", 403),
    ):  # fmt: skip
        status, answer = join(control, cluster.token(account), service)
        assert status == expected, (account, service, answer)


def test_a_token_is_of_one_instance(control: ControlProcess, cluster: Cluster) -> None:
    status, answer = join(control, cluster.token(), instance="payments-another")
    assert status == 403 and "payments-7d9f-x2-0b1c2d3e" in answer["error"]


def test_a_key_that_is_not_the_clusters_opens_nothing(control: ControlProcess, cluster: Cluster, tmp_path: Path) -> None:
    status, answer = join(control, Cluster(tmp_path).token())
    assert status == 403 and "signature" in answer["error"]
    unsigned = jwt.encode({"iss": ISSUER, "sub": "x"}, None, "none")
    assert join(control, unsigned)[0] == 403
    assert join(control, "no token")[0] == 403
    # Nothing of a token is in the log.
    assert cluster.token().split(".")[1] not in control.errors.read_text()


def test_a_new_key_of_the_cluster_is_taken_without_a_restart(control: ControlProcess, cluster: Cluster, tmp_path: Path) -> None:
    assert join(control, cluster.token())[0] == 200
    renewed = Cluster(tmp_path, "two")
    renewed.publish()
    eventually(lambda: join(control, renewed.token())[0] == 200, "the new key")
    assert join(control, cluster.token())[0] == 403


def test_who_may_join_changes_with_the_file(control: ControlProcess, cluster: Cluster) -> None:
    assert join(control, cluster.token("shop/payments-2"))[0] == 403
    control.edit("payments: [shop/payments]", "payments: [shop/payments, shop/payments-2]")
    eventually(lambda: join(control, cluster.token("shop/payments-2"))[0] == 200, "the new service account")


def test_without_a_cluster_in_the_file_no_pod_joins(tmp_path: Path, cluster: Cluster) -> None:
    with ControlProcess(tmp_path) as control:
        status, answer = join(control, cluster.token())
        assert status == 403 and "control.join.kubernetes" in answer["error"]


def test_two_clusters_of_the_same_issuer(tmp_path: Path, cluster: Cluster) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = Cluster(other, "one")
    second.publish()
    more = JOIN.replace("      issuer", "    - issuer").replace(
        "edge: front/edge}\n", f"edge: front/edge}}\n    - {{issuer: {ISSUER}, keys: other/jwks.json, services: {{accounts: shop/payments}}}}\n"
    )
    with ControlProcess(tmp_path, control=more) as control:
        assert join(control, cluster.token())[0] == 200
        assert join(control, second.token(), "accounts")[0] == 200
        assert join(control, second.token())[0] == 403
        assert join(control, cluster.token(), "accounts")[0] == 403


# -- members


def test_sidecars_join_as_pods_and_call_each_other(tmp_path: Path, control: ControlProcess, cluster: Cluster, app: int) -> None:
    ours = cluster.file("shop/payments")
    theirs = cluster.file("books/ledger", pod="ledger-0", uid="aaaaaaaa-0000-4000-8000-000000000002")
    with (
        Sidecar(control, "ledger", app, *pod_options(control, theirs)),  # type: ignore[arg-type]
        Sidecar(control, "payments", app, *pod_options(control, ours)) as payments,  # type: ignore[arg-type]
    ):
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        names = {each["instance"] for each in control.status()["instances"]}
        assert names == {"ledger-0-aaaaaaaa", "payments-7d9f-x2-0b1c2d3e"}
        # The state is lost with the pod's memory, not with its container: the certificate that is there is taken.
        payments.stop(signal.SIGKILL)
        issued = len(control.logged("a certificate is issued"))
        payments.start()
        payments.ready()
        assert len(control.logged("a certificate is issued")) == issued
        # Another pod, with nothing: it joins by its own token.
        payments.stop(signal.SIGKILL)
        shutil.rmtree(payments.state)
        ours.write_text(cluster.token(uid="cccccccc-0000-4000-8000-000000000003"))
        payments.start()
        payments.ready()
        assert "payments-7d9f-x2-cccccccc" in {each["instance"] for each in control.status()["instances"]}


def test_a_certificate_that_ended_is_replaced_by_joining_again(tmp_path: Path, cluster: Cluster, app: int) -> None:
    control = Control(tmp_path)
    control.life = 3
    try:
        (tmp_path / "root.pem").write_text(control.ca.bundle)
        options = ("--join-kubernetes", str(cluster.file()), "--control-ca", str(tmp_path / "root.pem"))
        with Sidecar(control, "payments", app, *options) as payments:
            control.stop()
            ends = payments.status()["certificate"]["not_after"]
            eventually(lambda: time.time() > ends + 1, "the end of the certificate")
            control.life = 3600
            control.start()
            eventually(lambda: len(control.joined) == 2, "the second joining")
            eventually(lambda: payments.status()["certificate"]["not_after"] > time.time() + 1800, "a certificate that lasts")
            assert [each["instance"] for each in control.joined] == ["payments-7d9f-x2-0b1c2d3e"] * 2
    finally:
        control.stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--join-kubernetes", "x"], "--control-ca belongs to"),
        (["--control-ca", "x"], "--control-ca belongs to"),
        (["--join-kubernetes", "x", "--control-ca", "x", "--token", "y"], "one way to join is enough"),
        (["--external-key", "cards=k"], "--external-key belongs to an --external-cert"),
    ],
)
def test_contradicting_ways_to_join_are_told(tmp_path: Path, control: ControlProcess, options: list[str], said: str) -> None:
    words = ["--service", "payments", "--app", "127.0.0.1:1", "--inbound", "127.0.0.1:2", "--outbound", "127.0.0.1:3", "--control", control.url]
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "mesh", "sidecar", *words, "--state", str(tmp_path / "s"), *options],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr


def test_a_file_that_is_no_token_is_told(control: ControlProcess, app: int) -> None:
    wrong = control.folder / "wrong.token"
    wrong.write_text("nonsense")
    sidecar = Sidecar(control, "payments", app, *pod_options(control, wrong), wait=False)  # type: ignore[arg-type]
    with sidecar:
        assert sidecar.process.wait(30) == 1
        assert "is no token of a service account" in sidecar.errors.read_text()
    assert not sidecar.state.joinpath("svid.pem").exists()


EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", kubernetes: {token}, control_ca: ca/1/root.crt, state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /}}, upstream: payments}}
"""


def test_an_edge_joins_as_a_pod(tmp_path: Path, control: ControlProcess, cluster: Cluster, app: int) -> None:
    token = cluster.file("front/edge", pod="edge-5c-1", uid="dddddddd-0000-4000-8000-000000000004")
    with Sidecar(control, "payments", app, *pod_options(control, cluster.file("shop/payments"))):  # type: ignore[arg-type]
        path = tmp_path / "edge.yaml"
        path.write_text(EDGE.format(control=control.url, token=token))
        with Gateway(path) as gateway:
            eventually(lambda: gateway.get("/v1/payments/7")[0] == 200, "the way through the edge")
            assert "edge-5c-1-dddddddd" in {each["instance"] for each in control.status()["instances"]}


MANIFEST = """apiVersion: v1
kind: Pod
metadata: {name: payments, annotations: {crossway.dev/inbound-port: "%d", crossway.dev/outbound-port: "%d", crossway.dev/admin-port: "%d", crossway.dev/probes-port: "%d"}}
spec:
  securityContext: {runAsUser: 1000}
  containers:
  - name: app
    image: payments
    ports: [{containerPort: %d}]
    readinessProbe: {httpGet: {path: /health, port: %d}}
"""


def test_what_is_injected_runs(tmp_path: Path, control: ControlProcess, cluster: Cluster, app: int) -> None:
    """The sidecar of an injected manifest, with its own words; only the places of its files are others."""
    ports = [free_port() for _ in range(4)]
    made = Injection("pod.yaml", {"control": control.url}).run(MANIFEST % (*ports, app, app))
    (pod,) = YAML(typ="safe").load_all(made)
    side = next(each for each in pod["spec"]["initContainers"] if each["name"] == "crossway-sidecar")
    token = cluster.file()
    places = {
        "/var/run/secrets/crossway/token": str(token), "/var/run/secrets/crossway/root.crt": str(tmp_path / "ca/1/root.crt"),
        "/var/run/crossway/member": str(tmp_path / "run/member"), "[$(POD_IP)]": "127.0.0.1",
    }  # fmt: skip

    def here(word: str) -> str:
        for old, new in places.items():
            word = word.replace(old, new)
        return word

    (tmp_path / "run").mkdir(0o777)
    (tmp_path / "run").chmod(0o777)  # as an emptyDir is
    with (tmp_path / "side.log").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", "gateway", *map(here, side["args"])], env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
    try:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            eventually(lambda probe=probe: asked(side[probe]["httpGet"]), probe)  # type: ignore[misc]
        assert asked(pod["spec"]["containers"][0]["readinessProbe"]["httpGet"])
        command = [here(each) for each in side["lifecycle"]["preStop"]["exec"]["command"]][1:]
        assert subprocess.run([sys.executable, "-m", "gateway", *command], env=environment(), check=False, timeout=PATIENCE).returncode == 0
        eventually(lambda: not asked(side["readinessProbe"]["httpGet"]), "the leaving")
        assert asked(side["livenessProbe"]["httpGet"])
    finally:
        process.kill()
        process.wait(PATIENCE)


def asked(probe: dict[str, Any]) -> bool:
    try:
        return request(probe["port"], probe["path"])[0] == 200
    except OSError:
        return False


def config_map(folder: Path, number: int, **files: str) -> None:
    """Put files in place as the kubelet does it with a ConfigMap: a folder of their own, and one link that is exchanged."""
    fresh = folder / f"..2026_{number}"
    fresh.mkdir(parents=True)
    for name, text in files.items():
        (fresh / name.replace("_", ".")).write_text(text)
        if not (folder / name.replace("_", ".")).is_symlink():
            (folder / name.replace("_", ".")).symlink_to(f"..data/{name.replace('_', '.')}")
    (folder / "..data_tmp").symlink_to(fresh.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for old in folder.glob("..2026_*"):
        if old != fresh:
            shutil.rmtree(old)


def test_a_config_map_that_changes_is_in_force_without_a_restart(tmp_path: Path, cluster: Cluster) -> None:
    mounted = tmp_path / "etc"
    mounted.mkdir()
    text = FILE.format(state=tmp_path / "mesh.db", lifetime="1h", control=JOIN).replace("  ca: ca\n", f"  ca: {tmp_path}/ca\n")
    keys = (tmp_path / "jwks.json").read_text()
    config_map(mounted, 1, mesh_yaml=text, jwks_json=keys)
    with ControlProcess(tmp_path, path=mounted / "mesh.yaml") as control:
        assert join(control, cluster.token())[0] == 200
        assert join(control, cluster.token("shop/new"))[0] == 403
        config_map(mounted, 2, mesh_yaml=text.replace("[shop/payments]", "[shop/payments, shop/new]"), jwks_json=keys)
        eventually(lambda: join(control, cluster.token("shop/new"))[0] == 200, "the new service account")
        # The keys alone: another file of the same map, so its mesh.yaml is another one as well.
        renewed = Cluster(tmp_path, "two")
        renewed.publish()
        config_map(mounted, 3, mesh_yaml=text, jwks_json=(tmp_path / "jwks.json").read_text())
        eventually(lambda: join(control, renewed.token())[0] == 200, "the new key")
        assert control.logged("the mesh's file is in force")


class ApiServer:
    """An API server's key endpoint: HTTPS below an authority of its own, for whoever shows its token."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.bearer, self.asked = folder, "first", 0
        authority = Authority("kubernetes")
        issued = authority.issue("localhost")
        (folder / "api-ca.pem").write_bytes(authority.pem)
        (folder / "api.pem").write_bytes(issued.pem + issued.key_pem)
        (folder / "api.token").write_text(self.bearer + "\n")
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                good = self.headers["authorization"] == f"Bearer {outer.bearer}" and self.path == "/openid/v1/jwks"
                body = (folder / "jwks.json").read_bytes() if good else b"{}"
                self.send_response(200 if good else 401)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "api.pem")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.join = JOIN.replace(
            "keys: jwks.json", f"keys: https://localhost:{self.server.server_port}/openid/v1/jwks\n      keys_ca: api-ca.pem\n      keys_token: api.token"
        )

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def api(tmp_path: Path, cluster: Cluster) -> Iterator[ApiServer]:
    made = ApiServer(tmp_path, cluster)
    yield made
    made.close()


def test_the_api_server_is_asked_for_its_keys(tmp_path: Path, cluster: Cluster, api: ApiServer) -> None:
    with ControlProcess(tmp_path, control=api.join) as control:
        eventually(lambda: join(control, cluster.token())[0] == 200, "the keys")
        # It goes: the keys that are known stay. Nobody's token makes it be asked again and again.
        api.close()
        assert join(control, cluster.token())[0] == 200
        before = api.asked
        assert [join(control, Cluster(tmp_path, f"unknown-{number}").token())[0] for number in range(3)] == [403] * 3
        assert api.asked == before


def test_a_token_for_the_api_server_that_is_exchanged_is_read_anew(tmp_path: Path, cluster: Cluster, api: ApiServer) -> None:
    api.bearer = "second"
    with ControlProcess(tmp_path, control=api.join) as control:
        eventually(lambda: api.asked and control.errors.read_text().count("the answer was 401"), "the refusal")
        status, answer = join(control, cluster.token())
        assert status == 403 and "does not publish" in answer["error"]
        (tmp_path / "api.token").write_text("second")
        eventually(lambda: join(control, cluster.token())[0] == 200, "the keys")
        assert "second" not in control.errors.read_text()


def test_an_api_server_below_another_authority_is_not_believed(tmp_path: Path, cluster: Cluster, api: ApiServer) -> None:
    (tmp_path / "api-ca.pem").write_bytes(Authority("another").pem)
    with ControlProcess(tmp_path, control=api.join) as control:
        eventually(lambda: "TLS failed" in control.errors.read_text(), "the refusal")
        assert join(control, cluster.token())[0] == 403 and api.asked == 0
