"""Reload of a real gateway: by signal, command and API; all workers or none."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

from tests.integration.processes import Gateway, Origin, eventually, write_config

SECOND = "public: {bind: 127.0.0.1:0}, second: {bind: 127.0.0.1:0}"


def versions(gateway: Gateway) -> set[int]:
    return {row["version"] for row in gateway.admin("/status")[1]["workers"]}


def test_sighup_changes_every_worker(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        pids = gateway.workers()
        write_config(config, origin.port, more="  - {name: more, match: {path: /more}, upstream: origin}\n")
        gateway.signal(signal.SIGHUP)
        eventually(lambda: versions(gateway) == {2})
        assert gateway.workers() == pids
        assert gateway.get("/more")[0] == 200
        assert "crossway_config_info{" in gateway.admin("/metrics")[1]
        assert "crossway_config_last_reload_success 1.0" in gateway.admin("/metrics")[1]


def test_the_command_reports_an_invalid_file_and_nothing_changes(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        digest = gateway.admin("/status")[1]["config"]["hash"]
        config.write_text(config.read_text().replace("upstream: origin", "upstream: orgin"))
        done = gateway.command("reload")
        assert done.returncode == 1
        assert f"{config}:" in done.stderr
        assert "orgin" in done.stderr
        status = gateway.admin("/status")[1]
        assert status["config"]["hash"] == digest
        assert not status["reload"]["ok"]
        assert versions(gateway) == {1}
        assert gateway.get()[0] == 200
        assert "REFUSED" in gateway.command("status").stdout
        assert "crossway_config_last_reload_success 0.0" in gateway.admin("/metrics")[1]
        assert "reload refused, the old configuration serves" in gateway.events()
        write_config(config, origin.port)
        done = gateway.command("reload")
        assert (done.returncode, done.stderr) == (0, "")
        assert gateway.admin("/status")[1]["reload"]["ok"]


def test_a_vanished_file_keeps_the_old_configuration(config: Path) -> None:
    with Gateway(config) as gateway:
        config.unlink()
        status, answer = gateway.admin("/reload", "POST")
        assert (status, answer["ok"]) == (422, False)
        assert gateway.get()[0] == 200


def test_the_api_demands_the_expected_hash(config: Path) -> None:
    with Gateway(config) as gateway:
        digest = gateway.admin("/status")[1]["config"]["hash"]
        assert gateway.admin("/reload", "POST", **{"If-Match": '"0000"'})[0] == 412
        assert versions(gateway) == {1}
        status, answer = gateway.admin("/reload", "POST", **{"If-Match": f'"{digest}"'})
        assert (status, answer["version"]) == (200, 2)
        assert gateway.admin("/reload")[0] == 405


def test_a_listener_comes_and_goes(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        write_config(config, origin.port, listeners=SECOND)
        assert gateway.admin("/reload", "POST")[0] == 200
        listeners = {row["name"]: row["address"] for row in gateway.admin("/status")[1]["listeners"]}
        gateway.addresses["second"] = f"http://{listeners['second']}"
        assert [gateway.get(name="second")[0] for _ in range(20)] == [200] * 20
        write_config(config, origin.port)
        assert gateway.admin("/reload", "POST")[0] == 200

        def gone() -> bool:
            try:
                gateway.get(name="second")
            except OSError:
                return True
            return False

        eventually(gone)
        assert gateway.get()[0] == 200


def test_the_number_of_workers_follows_the_file(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        write_config(config, origin.port, workers=3)
        assert gateway.admin("/reload", "POST")[0] == 200
        eventually(lambda: len(gateway.workers()) == 3)
        write_config(config, origin.port, workers=1)
        assert gateway.admin("/reload", "POST")[0] == 200
        eventually(lambda: len(gateway.children()) == 2)
        assert [gateway.get()[0] for _ in range(20)] == [200] * 20


def test_a_request_in_flight_ends_on_the_configuration_it_began_with(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        busy = gateway.connect()
        busy.request("GET", "/held")
        assert origin.held.acquire(timeout=20)
        text = config.read_text()
        config.write_text(text.replace("match: {prefix: /}", "match: {prefix: /elsewhere}"))
        assert gateway.admin("/reload", "POST")[0] == 200
        assert gateway.get("/held")[0] == 404
        origin.release.set()
        assert busy.getresponse().status == 200
        busy.close()


def test_reloads_under_load_refuse_nobody_and_leak_nothing(config: Path) -> None:
    with Gateway(config) as gateway:
        stop, statuses, failures = threading.Event(), set(), []

        def client() -> None:
            while not stop.is_set():
                try:
                    statuses.add(gateway.get()[0])
                except OSError as error:
                    failures.append(error)

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            assert gateway.admin("/reload", "POST")[0] == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert (statuses, failures) == ({200}, [])
        pids = [gateway.pid, *gateway.workers()]

        def descriptors() -> list[int]:
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

        assert gateway.admin("/reload", "POST")[0] == 200
        before = descriptors()
        for _ in range(5):
            assert gateway.admin("/reload", "POST")[0] == 200
        eventually(lambda: descriptors() <= before, "the end of the leak")


def test_many_sighups_are_few_reloads(config: Path) -> None:
    with Gateway(config) as gateway:
        for _ in range(20):
            gateway.signal(signal.SIGHUP)
        eventually(lambda: versions(gateway) > {1} or max(versions(gateway)) > 1)
        eventually(lambda: not gateway.admin("/status")[1]["reload"]["running"])
        assert max(versions(gateway)) < 10


def test_the_admin_address_can_move(config: Path) -> None:
    with Gateway(config) as gateway:
        where = config.parent / "admin.sock"
        config.write_text(config.read_text().replace("admin: {bind: 127.0.0.1:0}", f"admin: {{bind: 'unix:{where}'}}"))
        assert gateway.admin("/reload", "POST")[0] == 200
        gateway.addresses["admin"] = f"unix:{where}"
        eventually(lambda: gateway.command("health").returncode == 0)
        answer = json.loads(gateway.command("status", "-o", "json").stdout)
        assert answer["config"]["version"] == 2
        assert where.stat().st_mode & 0o777 == 0o600
        assert gateway.get()[0] == 200
