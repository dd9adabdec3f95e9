"""``python -m bench.scale``: runs every part, and writes operator.json and operator.md."""

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from bench.scale.bench import FULL, TINY, Bench, Size, make_bench
from bench.scale.floor import Launch
from bench.scale.gangs import FULL_STEADY, TINY_STEADY, SteadySize
from bench.scale.nodes import Nodes, play_nodes
from bench.scale.parts import (
    ROUND,
    Numbers,
    make_templates,
    measure_burst,
    measure_floor,
    measure_idle,
    measure_launches,
    measure_lives,
    measure_restart,
    measure_trouble,
    populate,
    record_launch,
)
from bench.scale.process import ROOT
from bench.scale.profile import read_samples, summarize
from bench.scale.report import to_markdown
from bench.scale.steady import measure_steady
from bench.scale.steadyreport import to_lines
from devcluster import ControlPlane, control_plane

RESULTS = ROOT / "docs" / "benchmarks"
PACKAGES = ("kopf", "kubernetes", "aiohttp", "uvloop", "pydantic")


async def measure(plane: ControlPlane, size: Size, say: Callable[[str], None]) -> Numbers:
    """Every part, in turn. Returns what is written to operator.json."""
    began = time.monotonic()
    result: Numbers = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
        "namespaces": size.namespaces,
    }

    def note(part: str, numbers: object) -> None:
        say(f"{time.monotonic() - began:6.0f} s  {part}: {json.dumps(numbers)}")

    async with make_bench(plane, size) as bench, play_nodes(bench.client) as nodes:
        launch = await record_launch(bench)
        done, held, empty = await make_templates(bench, nodes)
        result["emptyMiB"] = round(empty, 1)
        result["residents"] = await populate(bench, done, held)
        note("residents", result["residents"])
        result |= await _measure_rounds(bench, nodes, launch, empty, note)
        result["trouble"] = await measure_trouble(bench, nodes)
        note("trouble", result["trouble"])
    result["seconds"] = round(time.monotonic() - began)
    return result


async def _measure_rounds(
    bench: Bench, nodes: Nodes, launch: Launch, empty: float, note: Callable[[str, object], None]
) -> Numbers:
    """Restart, idle, launches, burst and lives, round by round, each round with an operator of its own.

    The last one runs under the profiler. The floor is measured before and after each round: the machine changes.
    """
    parts: Numbers = {name: [] for name in ("restart", "idle", "launches", "burst", "lives", "floor")}
    samples = bench.plane.directory / "samples"

    def keep(part: str, numbers: Numbers) -> None:
        parts[part].append(numbers)
        note(part, numbers)

    nodes.forget()
    keep("floor", await measure_floor(bench, launch))
    for number in range(bench.size.rounds):
        last = number == bench.size.rounds - 1
        nodes.forget()
        mark = bench.audit.mark()
        with bench.operator(samples=samples if last else None) as operator:
            keep("restart", await measure_restart(bench, operator, mark, empty))
            await operator.end_part()
            keep("idle", await measure_idle(bench, operator))
            keep("launches", await measure_launches(bench, operator, [ROUND]))
            await operator.rest()
            nodes.forget()
            await operator.end_part()
            keep("burst", await measure_burst(bench, operator, [ROUND]))
            await bench.clear(ROUND)  # nobody makes their pods, which the operator would tell of, one by one
            await operator.rest()
            nodes.forget()
            await operator.end_part()
            keep("lives", await measure_lives(bench, operator, nodes))
            await operator.end_part()
        nodes.forget()
        keep("floor", await measure_floor(bench, launch))
    names = ("start", "launches", "burst", "lives")
    parts["profile"] = {name: summarize(read_samples(samples / f"{part}.json")) for part, name in enumerate(names)}
    return parts


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.scale", description="Measure scale and cost of the operator.")
    parser.add_argument("--tiny", action="store_true", help="a few runs, to see that everything works, in a minute")
    parser.add_argument("--residents", type=int, help="runs that are there already (a tenth of them waiting)")
    parser.add_argument("--rounds", type=int, help="rounds, of which medians are told")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory to write operator.md and operator.json to")
    parser.add_argument("--keep", type=Path, help="directory for data and logs of the control plane (default: removed)")
    parser.add_argument(
        "--only", choices=("steady",), help="the steady state alone: what was measured is printed, and nothing written"
    )
    steady = parser.add_argument_group("steady state")
    steady.add_argument("--gangs", type=int, help="gangs that run")
    steady.add_argument("--pods", type=int, help="pods of each")
    steady.add_argument("--rack", type=int, help="nodes that die")
    steady.add_argument("--hung", type=int, help="kubelets that hang")
    steady.add_argument("--rate", type=float, help="new runs a second")
    steady.add_argument("--seconds", type=float, help="seconds in which all is well, and again in which it is not")
    return parser.parse_args(arguments)


def _choose_steady(options: argparse.Namespace) -> SteadySize:
    names = ("gangs", "pods", "rack", "hung", "rate", "seconds")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(TINY_STEADY if options.tiny else FULL_STEADY, **changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    size = TINY if options.tiny else FULL
    if options.residents is not None:
        size = replace(size, waiting=options.residents // 10, finished=options.residents - options.residents // 10)
    size = replace(size, rounds=options.rounds or size.rounds)

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        where = options.keep or Path(directory)
        # Each on a control plane of its own. Not on uvloop: its loop cannot be closed while a TLS connection still
        # says goodbye.
        with control_plane(where / "steady", audit_log=True) as plane:
            steady = asyncio.run(measure_steady(plane, _choose_steady(options), say))
        if options.only is not None:
            print("\n".join(to_lines(steady)))
            return 0
        with control_plane(where / "plane", audit_log=True) as plane:
            result = asyncio.run(measure(plane, size, say)) | {"steady": steady}
    text = to_markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "operator.md").write_text(text, encoding="utf-8")
    (options.out / "operator.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
