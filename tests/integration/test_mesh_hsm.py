"""The authority's keys in a token behind PKCS #11: SoftHSM stands for the HSM, and the control plane is a real process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.config.mesh_file import Pkcs11
from gateway.demo.registry import Registry
from gateway.mesh.ca import Ca
from gateway.mesh.keys import CaError, Keys
from tests.integration.control_kit import ControlProcess, Member, make_request
from tests.integration.processes import eventually

PLACES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so")
MODULE = next((each for each in PLACES if os.path.exists(each)), None)
PIN = "pin-of-4711"

pytestmark = pytest.mark.skipif(MODULE is None, reason="SoftHSM is missing, which stands for an HSM here; script/setup --test installs it for root")


class Hsm:
    """A token of SoftHSM, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tokens").mkdir()
        (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
        os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
        self.pin = folder / "pin"
        self.pin.write_text(f"{PIN}\n")
        self.pin.chmod(0o600)
        words = ["softhsm2-util", "--init-token", "--free", "--label", "the mesh", "--pin", PIN, "--so-pin", "officer-1"]
        subprocess.run(words, check=True, capture_output=True)

    @property
    def yaml(self) -> str:
        return f"  keys: {{pkcs11: {{module: {MODULE}, token: the mesh, pin_file: {self.pin}}}}}\n"

    def settings(self, *holds: str) -> Pkcs11:
        said: dict[str, Any] = {"module": MODULE, "token": "the mesh", "pin_file": str(self.pin)} | ({"holds": list(holds)} if holds else {})
        return Pkcs11.model_validate(said, context={"base": self.folder, "models": {}, "documents": []})


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hsm]:
    """One for all tests of a process: a PKCS #11 module is loaded, and reads its settings, once."""
    before = os.environ.get("SOFTHSM2_CONF")
    yield Hsm(tmp_path_factory.mktemp("hsm"))
    os.environ.pop("SOFTHSM2_CONF") if before is None else os.environ.__setitem__("SOFTHSM2_CONF", before)


def everything(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in folder.rglob("*") if each.is_file() and "tokens" not in each.parts)


def test_a_mesh_lives_by_keys_that_never_leave_the_token(token: Hsm, tmp_path: Path) -> None:
    with ControlProcess(tmp_path, control=token.yaml) as control:
        member = Member(control, "payments")
        assert member.join()[0] == 200 and member.renew()[0] == 200
        issuing = x509.load_pem_x509_certificates(member.svid.encode())[1]
        member.leaf.verify_directly_issued_by(issuing)
        issuing.verify_directly_issued_by(x509.load_pem_x509_certificate(member.bundle.encode()))
        member.open().has(lambda held: held["service"] == "payments", "a signed assignment")
        member.close()
        assert control.page("/crl")[0] == 200
        assert b"PRIVATE KEY" not in everything(tmp_path / "ca")
        address = (tmp_path / "ca" / "1" / "root.key").read_text()
        assert address.startswith("pkcs11:token=the%20mesh;object=crossway-root-")
        # It starts again by the same keys, and the root changes as ever.
        before = member.bundle
        assert control.stop() == 0
        control.start()
        for step in (["prepare"], ["activate", "--force"]):  # the member, which is not there, is not waited for
            done = control.command("rotate-root", *step)
            assert done.returncode == 0, done.stderr
        eventually(lambda: control.logged("the authority has changed"), "the new authority")
        assert member.renew()[0] == 200
        assert member.bundle.startswith(before) and member.bundle.count("BEGIN") == 2
        assert PIN.encode() not in everything(tmp_path), "neither log nor file nor state tells the PIN"


def test_the_demos_tokens_are_made_where_the_keys_are(token: Hsm, tmp_path: Path) -> None:
    with ControlProcess(tmp_path, control=token.yaml) as control:
        Registry(control.path).tokens({"first": "payments"})
        made = tmp_path / "first.token"
        assert made.stat().st_mode & 0o777 == 0o600
        assert Member(control, "payments").join(made.read_text())[0] == 200


def test_without_the_hsm_members_go_on_and_wait_for_certificates(token: Hsm, tmp_path: Path) -> None:
    with ControlProcess(tmp_path, control=token.yaml) as control:
        member = Member(control, "payments")
        assert member.join()[0] == 200
        member.open().has(lambda held: held["service"] == "payments", "a signed assignment")
        away = (token.folder / "tokens").rename(token.folder / "away")
        try:
            status, answer = member.renew()
            assert status == 503, answer
            control.edit("prefix: /v1/payments", "prefix: /v2/payments")
            member.has(lambda held: held["authorization"]["rules"][0]["prefix"] == "/v2/payments", "the new policy")
        finally:
            away.rename(token.folder / "tokens")
        eventually(lambda: member.renew()[0] == 200, "certificates again")
        member.close()


def test_the_root_alone_can_be_in_the_token(token: Hsm, tmp_path: Path) -> None:
    ca = Ca(tmp_path / "ca", "bank.test", Keys(token.settings("root"))).open()
    assert (tmp_path / "ca/1/root.key").read_text().startswith("pkcs11:")
    assert "PRIVATE KEY" in (tmp_path / "ca/1/issuing.key").read_text()
    before = ca.active.issuing.serial_number
    ca.renew_issuing()
    assert ca.active.issuing.serial_number != before
    ca.active.issuing.verify_directly_issued_by(ca.active.root)


def test_keys_move_into_the_token_by_a_rotation(token: Hsm, tmp_path: Path) -> None:
    Ca(tmp_path / "ca", "bank.test").open()
    ca = Ca(tmp_path / "ca", "bank.test", Keys(token.settings())).open()
    ca.prepare()
    ca.activate()
    leaf = x509.load_pem_x509_certificates(ca.issue(make_request()[0], "payments", 3600).chain.encode())
    assert len(leaf) == 3, "with the cross certificate by the old root, whose key is a file"
    leaf[2].verify_directly_issued_by(ca.generations[1].root)
    assert b"PRIVATE KEY" in everything(tmp_path / "ca/1") and b"PRIVATE KEY" not in everything(tmp_path / "ca/2")


def test_a_key_in_the_token_signs_and_does_nothing_else(token: Hsm) -> None:
    key, address = Keys(token.settings()).make("issuing")
    again = Keys(token.settings())
    path = token.folder / "key"
    path.write_bytes(address)
    path.chmod(0o600)
    found = again.read(path)
    assert found.public_key() == key.public_key()
    with pytest.raises(CaError, match="does not leave it"):
        found.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(CaError, match="nothing else"):
        found.exchange(ec.ECDH(), key.public_key())
    with pytest.raises(CaError, match=r"control\.keys"):
        Keys().read(path)
    path.write_bytes(address.replace(b"the%20mesh", b"another"))
    with pytest.raises(CaError, match="in another token"):
        again.read(path)
    path.write_text("pkcs11:token=the%20mesh;object=x;id=%00%01\n")
    with pytest.raises(CaError, match="no such key"):
        again.read(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of python-pkcs11, for what was in the session
def test_a_session_that_has_died_is_opened_anew(token: Hsm, tmp_path: Path) -> None:
    keys = Keys(token.settings())
    ca = Ca(tmp_path / "ca", "bank.test", keys).open()
    assert keys._token is not None
    keys._token._session.close()
    assert ca.issue(make_request()[0], "payments", 3600).serial


def test_a_wrong_pin_stops_the_start_and_is_not_shown(token: Hsm, tmp_path: Path) -> None:
    (tmp_path / "pin").write_text("wrong-4712")
    (tmp_path / "pin").chmod(0o600)
    with pytest.raises(RuntimeError, match="token the mesh: the PIN is wrong") as raised:
        ControlProcess(tmp_path, control=token.yaml.replace(str(token.pin), str(tmp_path / "pin")))
    assert "4712" not in str(raised.value)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("{pin}", "{folder}/missing", "a file that holds the PIN, 0600"),
        ("{pin}", "{folder}/open", "others may read it, and it holds a PIN"),
        ("{module}", "{folder}/none.so", "the vendor's library"),
        ("{module}", "{folder}/text.so", "not a PKCS #11 module"),
        ("the mesh", "no mesh", "there is no such token"),
    ],
)
def test_what_stops_it_from_starting_is_said(token: Hsm, tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "open").write_text(PIN)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "text.so").write_text("no library")
    words = {"pin": token.pin, "module": MODULE, "folder": tmp_path}
    with pytest.raises(RuntimeError) as raised:
        ControlProcess(tmp_path, control=token.yaml.replace(old.format(**words), new.format(**words)))
    assert said in str(raised.value) and PIN not in str(raised.value)
