"""`crossway schema`: print the JSON Schema of the configuration.

Strategy: editors complete and check YAML with it (`# yaml-language-server: $schema=crossway.schema.json`); it is made
from the same classes that read the file, so it cannot fall behind them.
"""

from __future__ import annotations

import argparse
import json


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument("--mesh", action="store_true", help="that of a mesh's file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    if args.mesh:
        from gateway.config.mesh_load import mesh_schema

        print(json.dumps(mesh_schema(), indent=2))
        return 0
    from gateway.config.document import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
