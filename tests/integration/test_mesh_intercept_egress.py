"""Interception and the way out together: an app that knows nothing of the mesh calls a host outside by its name and its address.

Strategy: the partner is a TLS server on the bridge's own side, beside the name server that knows it; payments is a host of its own, and its app is
redirected whatever it dials.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.mesh_kit import Control
from tests.integration.name_server import NameServer
from tests.integration.net_kit import OTHER, PAYMENTS, Host, Net, networks
from tests.integration.processes import PATIENCE, eventually
from tests.integration.test_mesh_egress import HOST, ROOT, Partner, cards

# An app that speaks TLS itself, as user argv[1], to argv[2]:argv[3]: what came of it.
TLS = """
import os, socket, ssl, sys
import encodings.idna
context = ssl.create_default_context(cafile=sys.argv[4])
os.setgroups([]); os.setuid(int(sys.argv[1]))
try:
    with socket.create_connection((sys.argv[2], int(sys.argv[3])), 15) as raw, context.wrap_socket(raw, server_hostname=sys.argv[5]) as secure:
        secure.sendall(b"GET /v1/charges HTTP/1.1\\r\\nhost: " + sys.argv[5].encode() + b"\\r\\n\\r\\n")
        print(secure.recv(100).split(b" ")[1].decode())
except OSError as error:
    print("refused")
"""


@networks
@pytest.mark.timeout(120)
def test_an_app_that_dials_a_host_outside_leaves_by_verified_tls_or_not_at_all(net: Net, tmp_path: Path) -> None:
    control = Control(tmp_path, host=net.address)
    record = tmp_path / "egress.jsonl"
    with NameServer(net.address) as names, Partner(tmp_path, host=net.address) as partner:
        names.a(HOST, net.address)
        control.external["payments"] = {"cards": cards(partner.port, names, addresses=["10.211.0.0/16"])}
        payments = Host(net, control, "payments", "--egress-audit", str(record))
        try:
            def ask(path: str = "/v1/charges", host: str = HOST, port: int = 80, uid: int = PAYMENTS) -> tuple[int, str]:
                return payments.ask(net.address, path, uid=uid, port=port, host=host)

            # Not intercepted, clear text gets nowhere: the partner speaks TLS only.
            assert ask(port=partner.port)[0] == 0
            payments.up()
            eventually(lambda: ask()[0] == 200, "the first look-up")
            # The app dials the address of the name and speaks clear text, at whatever port; what arrives is TLS for that name.
            assert ask() == (200, "ok") and ask(port=partner.port) == (200, "ok") and ask(port=443) == (200, "ok")
            assert set(partner.names) == {HOST} and b"host: " + HOST.encode() in partner.heads[-1]
            # What no rule allows, other names at the same address, and no name at all.
            status, text = ask("/v2/refunds")
            assert status == 403 and "no rule lets this caller do this" in text
            assert ask(host="api.other.example")[0] == 404
            assert payments.ask(net.address, "/v1/charges", port=partner.port)[0] == 404
            # TLS of the app's own is not understood, and does not get out; other users of the host are not the app.
            (tmp_path / "root.pem").write_bytes(ROOT.pem)

            def tls(uid: int) -> str:
                words = [*payments.inside, sys.executable, "-c", TLS, str(uid), net.address, str(partner.port), str(tmp_path / "root.pem"), HOST]
                return subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE * 2).stdout.strip()

            heads = len(partner.heads)
            assert tls(PAYMENTS) == "refused" and len(partner.heads) == heads
            assert tls(OTHER) == "200"
            # A server there that is not proved gets no request.
            control.external["payments"]["cards"]["hosts"] = ["wrong.cards.example"]
            names.a("wrong.cards.example", net.address)
            control.change()
            control.settled()
            heads = len(partner.heads)
            found = [ask(host="wrong.cards.example")[0]]
            eventually(lambda: found.append(ask(host="wrong.cards.example")[0]) or "wrong.cards.example" in partner.names, "a handshake with it")
            assert set(found) <= {502, 503} and len(partner.heads) == heads
            lines = [json.loads(line) for line in record.read_text().splitlines()]
            assert [(line["host"], line["path"]) for line in lines if line["status"] == 403] == [(HOST, "/v2/refunds")]
            assert sum(line["status"] == 200 for line in lines) >= 4 and all(line["route"] == "external>cards" for line in lines)
            denied = payments.sidecar.logged("a call was denied")
            assert [(line["external"], line["path"]) for line in denied] == [("cards", "/v2/refunds")]
        finally:
            payments.close()
            control.stop()
