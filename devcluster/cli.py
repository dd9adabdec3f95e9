"""The command line: ``python -m devcluster binaries|up|down|status|kubeconfig|image``."""

import argparse
import sys

from devcluster import binaries, pins
from devcluster.progress import DevclusterError, say


def _binaries(options: argparse.Namespace) -> None:
    for name, path in binaries.ensure(options.only or pins.GROUPS).items():
        print(f"{name}\t{path}")
    say("all binaries are there")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m devcluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("binaries", help="build the pinned Kubernetes, etcd, CoreDNS and helm")
    command.add_argument("--only", action="append", choices=pins.GROUPS, help="a group of them; may be repeated")
    command.set_defaults(run=_binaries)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DevclusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
