"""A real one-machine Kubernetes, for the demo and the tests."""

import argparse
import sys
from pathlib import Path

from devcluster import binaries, pins
from devcluster.cluster import Cluster, find, home
from devcluster.external import external_cluster
from devcluster.images import Image, ensure_images
from devcluster.paths import REPOSITORY
from devcluster.progress import DevclusterError, say, tail
from devcluster.start import DEFAULT_NAME, down, up


def _binaries(options: argparse.Namespace) -> None:
    groups = options.only or [group for group in pins.GROUPS if group not in pins.LAZY_GROUPS]
    for name, path in binaries.ensure(groups).items():
        print(f"{name}\t{path}")
    say("all binaries are there")


def _up(options: argparse.Namespace) -> None:
    cluster = up(options.name, options.nodes)
    say(f"cluster {cluster.name} is up")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def _down(options: argparse.Namespace) -> None:
    down(options.name)
    say(f"cluster {options.name} is gone")


def _running(options: argparse.Namespace) -> Cluster:
    cluster = external_cluster() or find(options.name)
    if cluster is None:
        raise DevclusterError(f"the cluster {options.name} is not up: `python -m devcluster up --name {options.name}`")
    return cluster


def _status(options: argparse.Namespace) -> None:
    cluster = _running(options)
    for part, state in cluster.status().items():
        print(f"{part:28}{state}")
    for name in ("kubeconfig", "s3_endpoint", "s3_access_key", "s3_secret_key", "bucket"):
        print(f"{name.replace('_', ' '):28}{getattr(cluster, name)}")


def _kubeconfig(options: argparse.Namespace) -> None:
    print(_running(options).kubeconfig)


def _logs(options: argparse.Namespace) -> None:
    logs = home(options.name) / "run" / "logs"
    if not logs.exists():
        logs = home(options.name) / "failed-logs"
    for log in sorted(logs.glob(f"{options.part or '*'}.log")):
        print(f"{log.stem}: {tail(log, options.lines)}\n")


def _image(options: argparse.Namespace) -> None:
    arguments = tuple((name, value) for name, _, value in (word.partition("=") for word in options.build_arg))
    image = Image(options.tag, options.file, options.context, arguments)
    print(ensure_images(_running(options), [image])[image.tag])


def _images(options: argparse.Namespace) -> None:
    for name in ensure_images(_running(options)).values():
        print(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m devcluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("binaries", help="build the pinned Kubernetes, etcd, CoreDNS and helm")
    command.add_argument("--only", action="append", choices=pins.GROUPS, help="a group of them; may be repeated")
    command.set_defaults(run=_binaries)

    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", default=DEFAULT_NAME, help=f"which cluster ({DEFAULT_NAME})")

    command = commands.add_parser("up", parents=[named], help="start a cluster, or say where it is")
    command.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="how many nodes it has (1)")
    command.set_defaults(run=_up)
    for name, run, text in (
        ("down", _down, "end a cluster and all that belongs to it; images stay"),
        ("status", _status, "say how each part of a cluster is, and where its store is"),
        ("kubeconfig", _kubeconfig, "print the path of a cluster's kubeconfig"),
    ):
        command = commands.add_parser(name, parents=[named], help=text)
        command.set_defaults(run=run)
    command = commands.add_parser("logs", parents=[named], help="show the last lines of the logs of a cluster's parts")
    command.add_argument("part", nargs="?", help="one part (kubelet-node-a, kube-apiserver, ...)")
    command.add_argument("--lines", type=int, default=10, help="how many lines of each (10)")
    command.set_defaults(run=_logs)
    command = commands.add_parser("image", parents=[named], help="build an image and bring it to a cluster's nodes")
    command.add_argument("--file", type=Path, required=True, help="its Dockerfile")
    command.add_argument("--tag", required=True, help="its name, DOMAIN/NAME:TAG")
    command.add_argument("--context", type=Path, default=REPOSITORY, help="the folder that it is built from")
    command.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    command.set_defaults(run=_image)
    command = commands.add_parser(
        "images", parents=[named], help="build the operator's and the trainer's image likewise"
    )
    command.set_defaults(run=_images)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DevclusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
