"""What a sidecar costs in memory: PSS of the whole process, from /proc/PID/smaps_rollup, idle, after traffic and after changes.

Strategy: a control plane made for tests, two real sidecars, a small app. PSS counts a shared page by how many share it, so the figure depends on
what else runs; beside it stands what a sidecar has for itself alone, and RSS as the bound from above. Assignments in a row show whether a long life
makes it grow: each moves one of many endpoints to another address, as the instances of a busy mesh do.
"""

from __future__ import annotations

import http.client
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.processes import Origin

REQUESTS = 500
SERVICES, INSTANCES = 20, 10  # that a service may call
CHANGES = 200
PAUSE = 4.0  # seconds until a sidecar has given back what its start or a change left
GOAL = 30.0  # MiB


def memory(pid: int) -> dict[str, float]:
    """PSS, what is private, and RSS, in MiB."""
    rows = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        rows[name.rstrip(":")] = int(value) / 1024
    return {"PSS": rows["Pss"], "private": rows["Private_Clean"] + rows["Private_Dirty"], "RSS": rows["Rss"]}


def show(when: str, *sidecars: Sidecar) -> None:
    for each in sidecars:
        print(f"{when:<24} {each.service:<10}" + "".join(f"  {name} {value:5.1f} MiB" for name, value in memory(each.process.pid).items()))


def change(control: Control, number: int = -1) -> None:
    """Tell both that one endpoint is elsewhere, or first of all that there are many services; wait until they obey."""
    for service in range(SERVICES):
        rows = [{"address": f"10.0.{service}.{place}:9000", "weight": 1, "zone": None, "labels": {}} for place in range(INSTANCES)]
        control.services.setdefault(f"other-{service}", {"protocol": "http", "endpoints": rows})
    if number >= 0:
        control.services[f"other-{number % SERVICES}"]["endpoints"][number % INSTANCES]["address"] = f"10.1.{number // 250}.{number % 250}:9000"
    control.change()
    control.settled()
    if number in (-1, CHANGES - 1):
        time.sleep(PAUSE)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        control, app = Control(Path(folder)), Origin()
        control.rules = [{"name": "payments-to-ledger", "from": ["payments"], "to": "ledger"}]
        with Sidecar(control, "ledger", app.port) as ledger:
            time.sleep(PAUSE)
            show("alone, idle", ledger)
            rows = [{"address": f"127.0.0.1:{ledger.inbound}", "weight": 1, "zone": None, "labels": {}}]
            control.services["ledger"] = {"protocol": "http", "endpoints": rows}
            with Sidecar(control, "payments", app.port) as payments:
                time.sleep(PAUSE)
                show("two, idle", ledger, payments)
                connection = http.client.HTTPConnection("127.0.0.1", payments.outbound)
                for _ in range(REQUESTS):
                    connection.request("GET", "/v1/x", headers={"host": "ledger"})
                    connection.getresponse().read()
                show(f"after {REQUESTS} requests", ledger, payments)
                for each in (ledger, payments):
                    each.page("/metrics")
                show("after a scrape", ledger, payments)
                change(control)
                show(f"{SERVICES * INSTANCES} endpoints", ledger, payments)
                for number in range(CHANGES):
                    change(control, number)
                show(f"after {CHANGES} assignments", ledger, payments)
                worst = max(memory(each.process.pid)["PSS"] for each in (ledger, payments))
        control.stop()
        app.close()
    print(f"goal: at most {GOAL:.0f} MiB PSS; the larger one has {worst:.1f}")
    return worst > GOAL


if __name__ == "__main__":
    sys.exit(main())
