"""``python -m osf_kernels info [--json]`` or ``--version``: what this can run and why not more."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from osf_kernels import info
from osf_kernels._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osf_kernels")
    parser.add_argument("--version", action="version", version=f"osf-kernels {__version__}")
    commands = parser.add_subparsers(dest="command")
    about = "versions, devices, backends and environment variables"
    command = commands.add_parser("info", help=about, description=about)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
