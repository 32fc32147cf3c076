"""The load generator over TLS: whom it believes, what it shows, what it counts, and that its figures name what was spoken."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.bench import runner
from gateway.bench.formats import facts
from gateway.bench.runner import CannotConnect, run
from gateway.bench.settings import Settings, TlsOptions, UsageError
from gateway.cli import main
from tests.integration.bench_server import BenchServer
from tests.integration.faults import ScriptedOrigin, Stream
from tests.integration.pki import Authority
from tests.integration.processes import write_config
from tests.integration.vault import TlsOrigin, Vault, open_vault, server_context

VERSIONS = {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a certificate of this host, and one of an authority that nobody knows."""
    made = tmp_path_factory.mktemp("bench-tls")
    root = Authority("Bench Root", number=80)
    root.issue("127.0.0.1", "bank.test").write(made, "good")
    (made / "ca.crt").write_bytes(root.pem)
    (made / "other.crt").write_bytes(Authority("Elsewhere", number=81).pem)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[BenchServer]:
    with BenchServer(cert=folder / "good") as running:
        yield running


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    with open_vault(tmp_path_factory.mktemp("vault")) as opened:
        yield opened


def short(url: str, tls: TlsOptions, **more: Any) -> Settings:
    given = {"url": url, "rate": 200.0, "connections": 4, "duration": 0.4, "warmup": 0.1, "timeout": 5.0, "tls": tls}
    return Settings(**{**given, **more})


def errors_of(document: dict[str, Any]) -> dict[str, int]:
    return {kind: number for kind, number in document["result"]["errors"].items() if number}


# -- what is counted


@pytest.mark.parametrize("path", ["/", "/chunked", "/early", "/empty", "/pieces", "/eof", "/closing", "/large"])
def test_a_good_answer_of_any_framing_is_an_answer(server: BenchServer, folder: Path, path: str) -> None:
    document = run(short(server.url(path), TlsOptions(cacert=folder / "ca.crt"), rate=100.0))
    assert errors_of(document) == {}
    assert document["result"]["answered"] == document["result"]["requests"] == 40
    assert document["latency"]["count"] == document["service"]["count"] == 40


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/reset", "reset"), ("/short", "closed"), ("/bad", "bad"), ("/long", "bad"), ("/unavailable", "status")],
)
def test_a_wrong_answer_is_an_error_of_its_kind(server: BenchServer, folder: Path, path: str, kind: str) -> None:
    document = run(short(server.url(path), TlsOptions(cacert=folder / "ca.crt")))
    assert errors_of(document) == {kind: 80}
    assert not document["valid"]


def test_an_end_without_close_notify_is_a_cut_answer(folder: Path) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.0 200 OK\r\n\r\nhalf of what")
        stream.close()

    with contextlib.closing(TlsOrigin(server_context(folder, "good"), script)) as origin:
        document = run(short(f"https://127.0.0.1:{origin.port}/", TlsOptions(cacert=folder / "ca.crt"), rate=50.0))
    assert errors_of(document) == {"reset": document["result"]["requests"]}


def test_a_large_body_is_sent_whole(server: BenchServer, folder: Path) -> None:
    settings = short(server.url(), TlsOptions(cacert=folder / "ca.crt"), method="POST", body=bytes(3_000_000), rate=20.0)
    document = run(settings)
    assert document["result"]["answered"] == document["result"]["requests"] == 8


def test_a_closed_loop_speaks_tls_too(server: BenchServer, folder: Path) -> None:
    document = run(short(server.url(), TlsOptions(cacert=folder / "ca.crt"), rate=None))
    assert errors_of(document) == {} and document["result"]["answered"] > 8


# -- what was spoken


@pytest.mark.parametrize("version", VERSIONS)
def test_version_cipher_and_handshakes_are_reported(folder: Path, version: str) -> None:
    with BenchServer(cert=folder / "good", version=version) as server:
        document = run(short(server.url(), TlsOptions(cacert=folder / "ca.crt")))
    assert document["result"]["answered"] == 80
    tls = document["result"]["tls"]
    [spoken] = tls["sessions"]
    assert spoken["version"] == VERSIONS[version] and "GCM" in spoken["cipher"] and spoken["handshakes"] == 4
    assert (tls["handshakes"], tls["resumed"], tls["failures"]) == (4, 0, {})
    assert document["handshake"]["count"] == 4 and document["handshake"]["min"] > 0
    # Connections were there before the first request: their handshakes are in no request's latency.
    assert document["latency"]["count"] == 80
    assert document["config"]["tls"]["verify"] is True
    shown = dict(facts(document))
    assert VERSIONS[version] in shown["TLS"] and "4 handshakes" in shown["TLS"] and shown["handshake"]


def test_plain_http_reports_no_tls() -> None:
    with BenchServer() as server:
        document = run(short(server.url(), TlsOptions()))
    assert document["result"]["tls"] is None and document["handshake"] is None and document["config"]["tls"] is None
    assert "TLS" not in dict(facts(document))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_connection_for_each_request_makes_full_handshakes_unless_told_to_resume(folder: Path, version: str) -> None:
    with BenchServer(cert=folder / "good", version=version) as server:
        full = run(short(server.url(), TlsOptions(cacert=folder / "ca.crt"), keep_alive=False, warmup=0.0))
        resumed = run(short(server.url(), TlsOptions(cacert=folder / "ca.crt", resume=True), keep_alive=False, warmup=0.0))
    for document in (full, resumed):
        assert errors_of(document) == {} and document["result"]["answered"] == 80
        # Those whose intended time lies at the end of the window may shake hands beyond it.
        assert 4 < document["result"]["tls"]["handshakes"] <= 80
        assert document["handshake"]["count"] == document["result"]["tls"]["handshakes"]
        # The request waits for the handshake, and its latency says so.
        assert document["latency"]["mean"] > document["handshake"]["min"]
    assert full["result"]["tls"]["resumed"] == 0
    # One full handshake for each of the four places.
    assert resumed["result"]["tls"]["handshakes"] - resumed["result"]["tls"]["resumed"] <= 4
    assert resumed["config"]["tls"]["resume"] is True and full["config"]["tls"]["resume"] is False


# -- whom it believes

TIMES = ("--warmup", "100ms", "--duration", "400ms", "--connections", "4", "--quiet", "--rate", "200")


def command(*words: str) -> int:
    return main(["bench", "run", *words, *TIMES])


def test_a_right_authority_exits_0_and_the_file_names_the_session(server: BenchServer, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    words = ("--json", str(path), "--html", str(tmp_path / "run.html"), "--timeout", "20s")
    # The window is no subject here: a busy machine may answer late, which is exit 3.
    assert command(server.url(), "--cacert", str(folder / "ca.crt"), *words) in (0, 3)
    document = json.loads(path.read_text())
    assert document["result"]["errors_total"] == 0 and document["result"]["answered"] == 80
    assert document["result"]["tls"]["sessions"][0]["version"] == "TLSv1.3"
    assert "TLSv1.3" in (tmp_path / "run.html").read_text()


def test_a_wrong_authority_exits_1_and_says_what_to_do(server: BenchServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(server.url(), "--cacert", str(folder / "other.crt")) == 1
    said = capsys.readouterr().err
    assert "TLS handshake with 127.0.0.1" in said and "issuer certificate" in said and "--cacert" in said


def test_the_machines_authorities_are_the_default(server: BenchServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "other.crt"))
    with pytest.raises(CannotConnect, match="issuer certificate"):
        run(short(server.url(), TlsOptions()))
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.crt"))
    assert errors_of(run(short(server.url(), TlsOptions()))) == {}


def test_with_a_connection_for_each_request_every_failure_is_counted(
    server: BenchServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    document = run(short(server.url(), TlsOptions(cacert=folder / "other.crt"), keep_alive=False))
    assert len(os.listdir("/proc/self/fd")) == before
    assert errors_of(document) == {"tls": 80}
    assert list(document["result"]["tls"]["failures"]) == ["unable to get local issuer certificate"]
    assert document["result"]["tls"]["handshakes"] == document["handshake"]["count"] == 0
    assert any("issuer certificate" in reason for reason in document["reasons"])
    assert command(server.url(), "--cacert", str(folder / "other.crt"), "--no-keepalive") == 3
    assert "issuer certificate" in " ".join(capsys.readouterr().out.split())


def test_another_name_is_not_believed(server: BenchServer, folder: Path) -> None:
    options = TlsOptions(cacert=folder / "ca.crt", server_name="elsewhere.test")
    with pytest.raises(CannotConnect, match="mismatch.*--server-name"):
        run(short(server.url(), options))


def test_insecure_believes_anyone_and_warns(server: BenchServer, folder: Path) -> None:
    document = run(short(server.url(), TlsOptions(insecure=True)))
    assert errors_of(document) == {} and document["result"]["answered"] == 80
    assert any("not verified" in warning for warning in document["warnings"])
    assert document["config"]["tls"]["verify"] is False
    verified = run(short(server.url(), TlsOptions(cacert=folder / "ca.crt")))
    assert not any("not verified" in warning for warning in verified["warnings"])


def test_a_server_without_tls_is_named_as_such(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 0.5)
    with BenchServer() as plain:
        url = plain.url().replace("http:", "https:")
        with pytest.raises(CannotConnect, match="does the server speak TLS on this port"):
            run(short(url, TlsOptions(cacert=folder / "ca.crt")))
        document = run(short(url, TlsOptions(cacert=folder / "ca.crt"), keep_alive=False, rate=50.0, warmup=0.0, timeout=0.2))
    # Nobody answers a ClientHello there. Requests keep their schedule, wait their time, and fail; the rest is unfinished.
    assert set(errors_of(document)) <= {"tls", "unfinished"} and document["result"]["errors"]["tls"] > 0
    assert document["result"]["errors_total"] == document["result"]["requests"] == 20


# -- against the gateway's own listeners


def test_the_urls_host_is_asked_for_and_verified(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a server that was told the name shows other.test's certificate instead of its first one."""
    monkeypatch.setattr(Settings, "resolve", lambda self: ("127.0.0.1", vault.gateway.port("public")))
    for host in ("other.test", "bank.test"):
        document = run(short(f"https://{host}:{vault.gateway.port('public')}/", TlsOptions(cacert=vault.folder / "root.crt")))
        assert errors_of(document) == {} and document["result"]["answered"] == 80
    with pytest.raises(CannotConnect, match="mismatch"):
        run(short("https://nobody.test/", TlsOptions(cacert=vault.folder / "root.crt")))


def test_a_client_shows_its_certificate(vault: Vault) -> None:
    url = f"https://127.0.0.1:{vault.gateway.port('mutual')}/"
    folder = vault.folder
    (folder / "both.pem").write_bytes((folder / "good.crt").read_bytes() + (folder / "good.key").read_bytes())
    for show in ({"cert": folder / "good.crt", "key": folder / "good.key"}, {"cert": folder / "both.pem"}):
        document = run(short(url, TlsOptions(cacert=folder / "root.crt", **show)))
        assert errors_of(document) == {} and document["result"]["answered"] == 80
        assert document["config"]["tls"]["client_certificate"] is True
    with pytest.raises(UsageError, match="does not belong"):
        run(short(url, TlsOptions(cacert=folder / "root.crt", cert=folder / "good.crt", key=folder / "stranger.key")))


@pytest.mark.parametrize(("show", "why"), [(None, "certificate required"), ("stranger", "unknown ca"), ("expired", "certificate expired")])
def test_a_refusal_after_the_handshake_is_told_with_its_reason(vault: Vault, show: str | None, why: str) -> None:
    """TLS 1.3: the client's handshake is complete when the server says no."""
    folder = vault.folder
    shown = {} if show is None else {"cert": folder / f"{show}.crt", "key": folder / f"{show}.key"}
    options = TlsOptions(cacert=folder / "root.crt", **shown)
    document = run(short(f"https://127.0.0.1:{vault.gateway.port('mutual')}/", options, keep_alive=False))
    assert not document["valid"] and document["result"]["answered"] == 0
    assert any(why in reason for reason in document["result"]["tls"]["failures"]), document["result"]["tls"]
    assert any(why in reason for reason in document["reasons"])
    assert document["result"]["errors"]["tls"] > 0
    assert document["result"]["errors_total"] == document["result"]["requests"] == 80


def test_refused_connections_are_not_opened_again_and_again(vault: Vault) -> None:
    """Each request tries once; what nobody asked for is not tried at all."""
    url = f"https://127.0.0.1:{vault.gateway.port('mutual')}/"
    try:
        document = run(short(url, TlsOptions(cacert=vault.folder / "root.crt"), rate=50.0))
    except CannotConnect as error:
        assert "certificate required" in str(error)
        return
    assert document["result"]["reconnects"] <= document["result"]["requests"] + 5 + 2 * 4


def test_a_client_that_comes_back_to_the_gateway_always_resumes(vault: Vault) -> None:
    """Each resumed TLS 1.3 handshake must bring the ticket for the next one."""
    url = f"https://127.0.0.1:{vault.gateway.port('modern')}/"
    document = run(short(url, TlsOptions(cacert=vault.folder / "root.crt", resume=True), keep_alive=False, warmup=0.0))
    tls = document["result"]["tls"]
    assert errors_of(document) == {} and document["result"]["answered"] == 80
    # One full handshake for each of the four places.
    assert tls["resumed"] > 4 and tls["handshakes"] - tls["resumed"] <= 4


def test_an_answer_in_tiny_records_is_whole(folder: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\nabcdefghijklmnopqrstuv"

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            stream.request()
            for i in range(0, len(answer), 5):
                stream.send(answer[i : i + 5])

    with contextlib.closing(TlsOrigin(server_context(folder, "good"), script)) as origin:
        document = run(short(f"https://127.0.0.1:{origin.port}/", TlsOptions(cacert=folder / "ca.crt"), rate=50.0))
    assert errors_of(document) == {} and document["result"]["answered"] == document["result"]["requests"]


def test_a_sweep_measures_a_listener_that_speaks_tls(folder: Path, tmp_path: Path) -> None:
    listeners = f"public: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: {folder / 'good.crt'}, key: {folder / 'good.key'}}}]}}}}"
    path = tmp_path / "sweep.json"
    with BenchServer() as server:
        config = write_config(tmp_path / "edge.yaml", server.port, listeners=listeners)
        words = ["/x", "-c", str(config), "--workers", "1", "--slo", "p50=900ms", "--rates", "50", "--quiet", "--json", str(path)]
        times = ["--warmup", "100ms", "--duration", "1s", "--connections", "4"]
        # Whether this machine is large and quiet enough to tell decides between 0, 1 and 3.
        assert main(["bench", "sweep", *words, *times, "--https", "--cacert", str(folder / "ca.crt")]) in (0, 1, 3)
    [count] = json.loads(path.read_text())["counts"]
    assert count["saturation_rate"] > 0 and count["points"][0]["achieved"] > 0
