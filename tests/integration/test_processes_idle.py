"""Processes that nobody asks anything of sleep; what wakes them after a long rest finds the time right."""

from __future__ import annotations

import email.utils
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults import ScriptedOrigin
from tests.integration.h2_kit import connect_h2, head
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, Gateway, Origin, eventually

WINDOW = 4.0  # seconds that are looked at
MOST = 3 * WINDOW  # turns in them: ten a second, as of a clock that ticks, would be over three times as many
REST = 3.0  # seconds; longer than the engine bears before it thinks that it was stopped

CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: 20s}}
listeners:
  public: {{bind: 127.0.0.1:0, timeouts: {{head: 500ms, keepalive: 1m}}}}
  two: {{bind: 127.0.0.1:0, http2: {{clear: true}}}}
upstreams: {{origin: {{targets: [127.0.0.1:{port}]}}}}
routes: [{{name: all, match: {{prefix: /}}, upstream: origin}}]
"""


def turns(pid: int) -> int:
    """How often a process has woken up so far, all its threads together."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))
    return total


def sleeps(*pids: int) -> bool:
    """Whether each of the processes sleeps nearly all the time, as of now."""
    before = [turns(pid) for pid in pids]
    time.sleep(WINDOW)
    return all(turns(pid) - had <= MOST for pid, had in zip(pids, before, strict=True))


@pytest.fixture
def gateway(tmp_path: Path, origin: Origin) -> Iterator[Gateway]:
    path = tmp_path / "idle.yaml"
    path.write_text(CONFIG.format(port=origin.port))
    with Gateway(path) as made:
        yield made


def test_all_processes_of_an_idle_gateway_sleep_with_and_without_clients(gateway: Gateway) -> None:
    everybody = [gateway.pid, *gateway.children()]
    assert len(everybody) == 3  # supervisor, worker, admin
    eventually(lambda: sleeps(*everybody), "a gateway that sleeps")
    assert gateway.get()[0] == 200
    connection = gateway.connect()
    connection.request("GET", "/x")
    connection.getresponse().read()
    eventually(lambda: sleeps(*everybody), "a gateway that sleeps beside a client that says nothing")
    connection.request("GET", "/x")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_sidecar_sleeps(tmp_path: Path) -> None:
    control, app = Control(tmp_path), Origin()
    with Sidecar(control, "ledger", app.port) as ledger:
        eventually(lambda: sleeps(ledger.process.pid), "a sidecar that sleeps")
    control.stop()
    app.close()


def test_deadlines_after_a_rest_count_from_what_happened(gateway: Gateway) -> None:
    for _ in range(2):
        time.sleep(REST)
        with socket.create_connection(("127.0.0.1", gateway.port()), PATIENCE) as client:
            client.sendall(b"GET /x HTTP/1.1\r\nhost: b\r\n")
            began = time.monotonic()
            assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - began > 0.4  # it was not over as soon as it began


def test_a_drain_after_a_rest_gives_clients_their_time(gateway: Gateway) -> None:
    with connect_h2(gateway.port("two"), polite=False) as client:  # its PING is not answered: the second step waits for its time
        assert client.ask(head()).status == 200
        time.sleep(REST)
        gateway.signal(signal.SIGTERM)
        client.until(lambda: client.gone, "the first GOAWAY")
        began = time.monotonic()
        client.until(lambda: len(client.gone) == 2 or client.end, "the second GOAWAY")
        assert time.monotonic() - began > 0.8
    assert gateway.wait() == 0


def test_gauges_are_right_when_all_is_quiet(gateway: Gateway) -> None:
    def gauge(name: str) -> float:
        (line,) = [line for line in gateway.admin("/metrics")[1].splitlines() if line.startswith(f"{name} ")]
        return float(line.rpartition(" ")[2])

    clients = [gateway.connect() for _ in range(3)]
    for client in clients:
        client.request("GET", "/x")
        client.getresponse().read()
    eventually(lambda: gauge("crossway_connections") == 3)
    for client in clients:
        client.close()
    eventually(lambda: gauge("crossway_connections") == 0)


def test_admin_pages_say_what_time_it_is(gateway: Gateway) -> None:
    for _ in range(2):
        connection = gateway.connect("admin")
        connection.request("GET", "/livez")
        said = email.utils.parsedate_to_datetime(connection.getresponse().getheader("date", ""))
        connection.close()
        assert abs(said.timestamp() - time.time()) < REST
        time.sleep(REST)


def test_files_that_come_with_a_reload_are_watched(tmp_path: Path) -> None:
    """Nothing was watched before, so nobody looked."""
    origin, authority = ScriptedOrigin(), Authority("Late", number=97)
    authority.issue("late.test", subject="first.test").write(tmp_path, "late")
    path = tmp_path / "late.yaml"
    plain = CONFIG.format(port=origin.port)
    path.write_text(plain)

    def shown(port: int) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority.pem.decode())
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock, context.wrap_socket(sock, server_hostname="late.test") as secure:
            return str(dict(name for (name,) in secure.getpeercert()["subject"])["commonName"])  # type: ignore[index,misc]

    with Gateway(path) as gateway:
        port = gateway.port("two")
        path.write_text(plain.replace("http2: {clear: true}", "tls: {certificates: [{cert: late.crt, key: late.key}]}").replace("two: {bind: 127.0.0.1:0", f"two: {{bind: 127.0.0.1:{port}"))
        assert gateway.admin("/reload", "POST")[0] == 200
        assert shown(port) == "first.test"
        authority.issue("late.test", subject="second.test").write(tmp_path, "late")
        eventually(lambda: shown(port) == "second.test", "the new certificate")
    origin.close()
