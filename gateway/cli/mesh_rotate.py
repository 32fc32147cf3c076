"""`crossway mesh rotate-root STEP`: change the mesh's root in three steps, with no restart and no failed call.

Strategy: each step is refused until the one before has reached everybody: a new root issues when all members trust it, an old one
goes when nothing that it vouches for is in use. `--force` is for those who know better.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli import Subparsers
from gateway.cli.mesh_file import add_file, with_store

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.ca import Ca
    from gateway.mesh.store import Store

STEPS = ("show", "prepare", "activate", "retire", "issuing")


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "rotate-root", help="change the mesh's root: prepare, activate, retire",
        epilog="prepare: a new root joins the bundle. activate: it issues. retire: the old one leaves the bundle. issuing: a new "
        "issuing certificate below the active root. show: where it stands.",
    )  # fmt: skip
    parser.add_argument("step", choices=STEPS, help="what to do")
    add_file(parser)
    parser.add_argument("--root-key", metavar="FILE", type=Path, help="the active root's key, when it is not in the authority's folder")
    parser.add_argument("--force", action="store_true", help="although not every member is ready")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    async def work(mesh: MeshFile, store: Store) -> int:
        from gateway.mesh.ca import Ca
        from gateway.mesh.keys import CaError, keys_of

        if mesh.control.spire is not None:
            raise ValueError("the roots of this mesh are SPIRE's, which changes them itself")
        ca = Ca(mesh.control.ca, mesh.trust_domain, keys_of(mesh)).open(make=False)
        if parsed.step == "prepare":
            number = ca.prepare(parsed.root_key)
            crossed = "" if ca.generations[number].cross else "; the active root's key is not there, so members that are away now must come back before `activate`"
            print(f"generation {number} is in the bundle and does not issue yet{crossed}")
        elif parsed.step == "activate":
            if not parsed.force and (behind := await waiting(store, mesh)):
                raise CaError(f"not all members have the bundle yet: {', '.join(behind[:10])}; wait, or --force")
            print(f"generation {ca.activate()} issues; renewals bring everybody to it within half of {mesh.certificates.lifetime / 3600:g} h")
        elif parsed.step == "retire":
            oldest = min(ca.generations)
            if not parsed.force and (held := await living(store, oldest)):
                raise CaError(f"{held} certificates of generation {oldest} are not over yet; wait until they are renewed, or --force")
            print(f"generation {ca.retire()} is out of the bundle; its folder is {mesh.control.ca}/retired-{oldest}")
        elif parsed.step == "issuing":
            ca.renew_issuing(parsed.root_key)
            print("a new issuing certificate is in use; certificates of the one before stay good")
        show(ca)
        return 0

    return with_store(parsed, work)


def show(ca: Ca) -> None:
    for number, each in ca.generations.items():
        state = "issues" if number == ca.active_number else "in the bundle"
        key = "root key offline" if each.offline else "root key in the folder"
        print(f"generation {number}: {state}, {key}, root until {each.root.not_valid_after_utc:%Y-%m-%d}, issuing until {each.issuing.not_valid_after_utc:%Y-%m-%d}")


async def waiting(store: Store, mesh: MeshFile) -> list[str]:
    """Return the members that are there and have not acknowledged what they were sent last, or cannot be sent anything."""
    from gateway.mesh.report import report

    said = await report(store, mesh)
    behind = [row for row in said["instances"] if row["state"] == "silent" or (row["state"] != "gone" and (row["seconds_waiting"] is not None or row["refused"]))]
    return [f"{row['service']}/{row['instance']}" for row in behind]


async def living(store: Store, generation: int) -> int:
    """Return how many instances hold a certificate of a generation as their newest."""
    rows = await store.rows(
        "SELECT COUNT(*) AS n FROM certificates c WHERE c.generation = ? AND c.not_after > ? AND NOT EXISTS"
        " (SELECT 1 FROM certificates d WHERE d.service = c.service AND d.instance = c.instance AND d.generation > c.generation)",
        generation, int(time.time()),
    )  # fmt: skip
    return int(rows[0]["n"])
