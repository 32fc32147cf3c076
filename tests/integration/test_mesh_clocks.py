"""Members whose wall clocks are wrong: what goes on within what certificates bear, and beyond it that they are shut out, quietly, and told why.

Strategy: libfaketime moves the wall clock of one process and leaves its monotonic clock alone; the shift stands in a file, so a clock is set while
its process runs. Everybody else has the machine's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.integration.control_kit import ControlProcess, metric
from tests.integration.mesh_kit import Sidecar
from tests.integration.processes import PATIENCE, Gateway, Origin, environment, eventually
from tests.integration.relay import Fault, Relay
from tests.integration.test_mesh_whole import call

FAKETIME = next((path for path in map(str, sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")))), "")
clocks = pytest.mark.skipif(not FAKETIME, reason="libfaketime is missing, which moves the clock of one process; script/setup --test installs it where it can")
LONG = 60.0  # seconds; longer than any pause of a member
WRONG = "this machine's clock is not the control plane's"


class Clock:
    """A wall clock that can be set, for the processes behind `wrapper`."""

    def __init__(self, folder: Path, shift: str = "+0") -> None:
        self.path = folder / "clock"
        self.set(shift)
        said = {
            "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(self.path), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }  # fmt: skip
        self.wrapper = ("env", *(f"{name}={value}" for name, value in said.items()))

    def set(self, shift: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(shift + "\n")
        fresh.rename(self.path)


def soon(condition: Any, what: str) -> Any:
    """As eventually(), for what waits for a pause of the member."""
    end = time.monotonic() + LONG
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.1)
    return value


def enrol(clock: Clock | None, sidecar: Sidecar, control: str) -> dict[str, Any]:
    """Renew a member's certificate with the program that its sidecar uses, by a clock; the outcome."""
    job = {"kind": "renew", "state": str(sidecar.state), "service": sidecar.service, "control": control}
    done = subprocess.run(
        [*(clock.wrapper if clock is not None else ()), sys.executable, "-m", "gateway.mesh.enrol"], input=json.dumps(job), env=environment(), capture_output=True, text=True, check=True, timeout=PATIENCE * 2,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def issued(control: ControlProcess) -> float:
    return metric(control, "crossway_control_certificates_issued_total")


def problems(control: ControlProcess, service: str) -> str:
    return "; ".join(problem for row in control.status()["instances"] if row["service"] == service for problem in row["problems"])


@clocks
@pytest.mark.parametrize("shift", ["-3m", "+3m", "+10m"])
def test_a_clock_that_is_off_by_minutes_fails_no_call_and_no_renewal_and_is_told(tmp_path: Path, origin: Origin, shift: str) -> None:
    clock = Clock(tmp_path, shift)
    words = f"{shift[1:-1]} min {'ahead of' if shift[0] == '+' else 'behind'} the control plane's"
    with (
        ControlProcess(tmp_path) as control,
        Sidecar(control, "ledger", origin.port, wrapper=clock.wrapper) as ledger,  # type: ignore[arg-type]
        Sidecar(control, "payments", origin.port) as payments,  # type: ignore[arg-type]
    ):
        control.edit("    - {name: payments-to-ledger", "    - {name: back, from: [ledger], to: payments}\n    - {name: payments-to-ledger")
        # Every handshake is judged on both sides: its certificate by others' clocks, others' by its own.
        eventually(lambda: call(payments, "ledger")[0] == 200, "a call to it")
        eventually(lambda: call(ledger, "payments")[0] == 200, "a call of it")
        before = issued(control)
        outcome = enrol(clock, ledger, control.url)
        assert "error" not in outcome and outcome["identity"] == "spiffe://bank.test/service/ledger" and issued(control) == before + 1
        # And the operator is told, at three places.
        line = eventually(lambda: ledger.logged(WRONG), "the line")[0]
        assert line["level"] == "error" and line["clock"] == words
        ahead = int(shift[:-1]) * 60
        assert abs(ledger.metric("crossway_mesh_clock_ahead_seconds") - ahead) < 5 and abs(payments.metric("crossway_mesh_clock_ahead_seconds")) < 5
        eventually(lambda: f"its machine's clock is {words}" in problems(control, "ledger"), "the status")
        assert not problems(control, "payments")
        assert control.logged("a member's clock is not this machine's")[0]["clock"] == words
        # Set right, it is told as well.
        clock.set("+0")
        soon(lambda: ledger.logged("this machine's clock agrees with the control plane's again"), "the line")
        soon(lambda: not problems(control, "ledger"), "the status")


@clocks
@pytest.mark.parametrize(("shift", "told"), [("-10m", "10 min behind"), ("-25h", "is not yet valid"), ("+25h", "25 h 0 min ahead")])
def test_who_cannot_use_a_certificate_gets_none_and_keeps_his_token(tmp_path: Path, origin: Origin, shift: str, told: str) -> None:
    clock = Clock(tmp_path, shift)
    with ControlProcess(tmp_path, lifetime="24h") as control:
        token = control.token("ledger")
        with Sidecar(control, "ledger", origin.port, token=token, wrapper=clock.wrapper, wait=False) as ledger:  # type: ignore[arg-type]
            said = eventually(lambda: ledger.errors.read_text(), "its first words") and eventually(
                lambda: [text for text in ledger.errors.read_text().splitlines() if told in text], "the reason"
            )[0]
            assert "clock" in said
            assert issued(control) == 0
            # The clock is set right: the same token is good, without anybody's doing where the process lives on.
            clock.set("+0")
            if shift == "+25h":
                assert ledger.process.wait(PATIENCE) == 1
                assert ledger.process.stdout is not None
                ledger.process.stdout.close()
                ledger.start()
            soon(lambda: ledger.process.poll() is not None or issued(control) == 1, "its certificate")
            ledger.ready()


@clocks
def test_a_clock_that_jumps_a_day_ahead_shuts_out_without_a_hot_loop_and_heals(tmp_path: Path, origin: Origin) -> None:
    clock = Clock(tmp_path)
    with (
        ControlProcess(tmp_path, lifetime="24h") as control,
        Sidecar(control, "ledger", origin.port) as ledger,  # type: ignore[arg-type]
        Sidecar(control, "payments", origin.port, wrapper=clock.wrapper) as payments,  # type: ignore[arg-type]
    ):
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
        held = payments.status()["certificate"]["serial"]
        certificates = issued(control)
        began = time.monotonic()
        clock.set("+25h")
        assert eventually(lambda: payments.logged(WRONG), "the line")[0]["clock"].startswith("25 h 0 min ahead")
        assert eventually(lambda: payments.logged("the certificate has expired and is not renewed; members refuse this one"), "the alarm")[0]["clock"]
        # Open connections go on; a new one has to be proved, and by this clock nobody's certificate is good.
        ledger.stop(9)
        assert ledger.process.stdout is not None
        ledger.process.stdout.close()
        ledger.start()
        ledger.ready()
        eventually(lambda: call(payments, "ledger")[0] >= 500, "the refusal")
        # It asks again with growing pauses, is told why each time, and costs the authority nothing.
        refused = soon(lambda: (lines := payments.logged("the certificate could not be renewed"))[3:] and lines, "four attempts")
        assert time.monotonic() - began > 0.8 * (1 + 2 + 4), "pauses that grow"
        assert all("the clock of your machine is 25 h 0 min ahead of the control plane's" in line["error"] for line in refused)
        assert issued(control) == certificates and payments.status()["certificate"]["serial"] == held
        assert metric(control, 'crossway_control_requests_refused_total{reason="clock"}') >= 4
        soon(lambda: "its machine's clock is 25 h 0 min ahead" in problems(control, "payments"), "the status")
        # Set right, all is well again, and the certificate that it had still serves.
        clock.set("+0")
        soon(lambda: call(payments, "ledger")[0] == 200, "the call")
        soon(lambda: payments.metric("crossway_mesh_certificate_alarm") == 0, "the end of the alarm")
        assert payments.logged("this machine's clock agrees with the control plane's again")


@clocks
def test_a_clock_that_is_far_ahead_of_half_of_a_life_renews_no_more_often_than_it_must(tmp_path: Path, origin: Origin) -> None:
    clock = Clock(tmp_path)
    with ControlProcess(tmp_path, lifetime="1h") as control, Sidecar(control, "ledger", origin.port, wrapper=clock.wrapper) as ledger:  # type: ignore[arg-type]
        # By its clock every certificate is past its half when it comes; it is renewed once, then at half of what is left.
        clock.set("+40m")
        soon(lambda: ledger.metric("crossway_mesh_certificate_renewals_total") == 1, "the renewal")
        soon(lambda: ledger.status()["control"]["connects"] >= 2, "the stream with the new certificate")
        seen = len(ledger.logged(WRONG))
        clock.set("+0")
        soon(lambda: ledger.logged("this machine's clock agrees with the control plane's again"), "the line")
        assert seen == 1 and ledger.metric("crossway_mesh_certificate_renewals_total") == 1 and issued(control) == 2


@clocks
def test_a_clock_that_is_behind_hears_what_is_revoked_and_starts_only_where_it_can_judge(tmp_path: Path, origin: Origin) -> None:
    clock = Clock(tmp_path)
    with (
        ControlProcess(tmp_path, lifetime="24h") as control,
        Sidecar(control, "ledger", origin.port),  # type: ignore[arg-type]
        Sidecar(control, "payments", origin.port, wrapper=clock.wrapper) as payments,  # type: ignore[arg-type]
    ):
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")

        def again(shift: str) -> None:
            payments.stop(9)
            assert payments.process.stdout is not None
            payments.process.stdout.close()
            clock.set(shift)
            payments.start()

        # Ten minutes: certificates of a moment ago are not good by its clock, but the control plane's word is.
        again("-10m")
        payments.ready()
        eventually(lambda: payments.status()["control"]["connected"], "the stream")
        eventually(lambda: call(payments, "ledger")[0] >= 500, "the refusal")
        before = payments.status()["assignment"]["version"]
        assert control.command("revoke", "ledger").returncode == 0
        eventually(lambda: payments.status()["assignment"]["version"] > before, "the news")
        outcome = enrol(clock, payments, control.url)
        assert "the clock of your machine is 10 min behind the control plane's: a certificate of now would not be valid yet there" in outcome["error"]
        # A day: nothing can be believed, neither the disk nor who answers; it serves nobody, and says why.
        again("-25h")
        line = eventually(lambda: payments.logged("the assignment on disk is not used"), "the line")[-1]
        assert "not yet valid (is this machine's clock right? It says " in line["reason"]
        line = eventually(lambda: payments.logged("the control plane cannot be reached"), "the line")[-1]
        assert "not yet valid (is this machine's clock right? It says " in line["error"]
        assert call(payments, "ledger")[0] == 0 and not payments.status()["ready"]
        clock.set("+0")
        soon(lambda: payments.status()["ready"], "its return")


@clocks
def test_how_old_an_assignment_is_does_not_depend_on_whose_clock_is_right(tmp_path: Path, origin: Origin) -> None:
    clock = Clock(tmp_path, "+3h")
    overdue = "crossway_mesh_assignment_overdue_seconds"
    with ControlProcess(tmp_path, lifetime="24h") as control:
        with Sidecar(control, "ledger", origin.port, wrapper=clock.wrapper) as ledger:  # type: ignore[arg-type]
            eventually(lambda: ledger.status()["control"]["applied"] >= 1 and control.status()["instances"][0]["applied"], "its assignment")
            control.kill()
            eventually(lambda: not ledger.status()["control"]["connected"], "the end of the stream")
            assert ledger.metric(overdue) == 0, "it was heard a moment ago, whatever the clocks say"
            # The clock is set while nobody is there to say what time it is.
            clock.set("+9h")
            assert ledger.metric(overdue) == 0
            clock.set("+3h")
            ledger.stop(9)
            assert ledger.process.stdout is not None
            ledger.process.stdout.close()
            ledger.start()
            ledger.ready()
            assert ledger.metric(overdue) == 0, "nor after a start from the disk"
        # What is fresh for a second only is overdue soon, also where the clock is behind.
        clock.set("-3m")
        control.edit("  ca: ca\n", "  ca: ca\n  fresh: 1s\n")
        again = ControlProcess(tmp_path)
        with again, Sidecar(again, "payments", origin.port, wrapper=clock.wrapper) as payments:  # type: ignore[arg-type]
            eventually(lambda: payments.status()["control"]["applied"] >= 1, "its assignment")
            again.kill()
            eventually(lambda: payments.metric(overdue) > 0, "the age")


EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
policies:
  token: {{jwt: {{issuer: https://auth.bank.test, audience: payments, secret: "{secret}", algorithms: [HS256]}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /}}, upstream: payments, policies: [token]}}
"""
SECRET = "0123456789abcdef0123456789abcdef"


@clocks
def test_user_contexts_bear_half_a_minute_and_name_the_clock_beyond_it(tmp_path: Path, origin: Origin) -> None:
    clock = Clock(tmp_path)
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", origin.port, wrapper=clock.wrapper) as payments:  # type: ignore[arg-type]
        control.edit("prefix: /v1/payments}", "prefix: /v1/payments, claims: {scope: 'payments:write'}}")
        path = tmp_path / "edge.yaml"
        path.write_text(EDGE.format(control=control.url, token=control.token("edge"), secret=SECRET))
        with Gateway(path) as edge:

            def ask() -> tuple[int, bytes]:
                """As a user of his own each time, of whom nobody remembers anything."""
                said = {"iss": "https://auth.bank.test", "aud": "payments", "sub": os.urandom(8).hex(), "exp": int(time.time()) + 600, "scope": "payments:write"}
                connection = edge.connect("public")
                try:
                    connection.request("GET", "/v1/payments/7", headers={"authorization": "Bearer " + jwt.encode(said, SECRET, algorithm="HS256")})
                    answer = connection.getresponse()
                    return answer.status, answer.read()
                finally:
                    connection.close()

            eventually(lambda: ask()[0] == 200, "a call for a user")
            for shift in ("+20s", "-20s"):
                clock.set(shift)
                assert ask()[0] == 200, shift
            for shift, why in (("+3m", "has expired"), ("-3m", "not valid yet")):
                clock.set(shift)
                _, body = eventually(lambda: (answer := ask())[0] == 403 and answer, shift)
                assert why in body.decode() and "by this machine's clock" in body.decode(), body
                eventually(lambda: payments.logged(WRONG), "the line")
            clock.set("+0")
            eventually(lambda: ask()[0] == 200, "a call for a user")


def test_a_slow_way_to_the_control_plane_is_not_taken_for_a_slow_clock(tmp_path: Path, origin: Origin) -> None:
    # A certificate of a minute bears a clock that is 6 s behind; a handshake may take longer.
    with ControlProcess(tmp_path, lifetime="1m") as control, Sidecar(control, "ledger", origin.port) as ledger, Relay(control.port, lambda number: Fault(delay=7.0)) as slow:  # type: ignore[arg-type]
        outcome = enrol(None, ledger, f"https://127.0.0.1:{slow.port}")
        assert slow.accepted and outcome.get("identity") == "spiffe://bank.test/service/ledger", outcome
