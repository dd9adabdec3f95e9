"""``python -m bench.peers``: all rounds, and writes peers.json and peers.md."""

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bench.peers.contenders import CONTENDERS, JOBSET, TRAINER
from bench.peers.measure import FULL, TINY, Size, measure_round
from bench.peers.report import to_markdown
from bench.scale.process import ROOT
from devcluster import binaries, control_plane
from lora_operator.settings import Settings

RESULTS = ROOT / "docs" / "benchmarks"
Numbers = dict[str, Any]


def measure(size: Size, where: Path, say: Callable[[str], None]) -> Numbers:
    """All rounds of all contenders, which take turns."""
    rounds: dict[str, list[Numbers]] = {contender.title: [] for contender in CONTENDERS}
    for number in range(size.rounds):
        for contender in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
            place = where / f"{number}-{contender.kind}"
            with control_plane(place, audit_log=True) as plane:
                numbers = asyncio.run(measure_round(contender, plane, size))
            rounds[contender.title].append(numbers)
            say(f"round {number + 1}, {contender.title}: {json.dumps(numbers)}")
    return {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "contenders": [contender.title for contender in CONTENDERS],
        "first": size.first,
        "clients": _read_rates(),
        "rounds": rounds,
    }


def _read_rates() -> dict[str, str]:
    """What each client is allowed, as shipped. JobSet says it in its code alone."""
    own = Settings()
    source = binaries.find_source("peers", TRAINER.module)
    trainer = yaml.safe_load((source / TRAINER.config).read_text())["clientConnection"]
    return {
        CONTENDERS[0].title: f"{own.api_qps:g} and {own.api_burst}",
        TRAINER.name: f"{trainer['qps']} and {trainer['burst']}",
        JOBSET.name: "500 and 500",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.peers", description="Compare the operator with Kubeflow Trainer.")
    parser.add_argument("--tiny", action="store_true", help="a few runs, to see that everything works")
    parser.add_argument("--rounds", type=int, help="rounds, of which medians are told")
    parser.add_argument("--burst", type=int, help="runs that come at once")
    parser.add_argument("--launches", type=int, help="runs that come one by one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory to write peers.md and peers.json to")
    parser.add_argument(
        "--keep", type=Path, help="directory for data and logs of the control planes (default: removed)"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    size = TINY if options.tiny else FULL
    changes = {name: getattr(options, name) for name in ("rounds", "burst", "launches")}
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    with tempfile.TemporaryDirectory() as directory:
        binaries.ensure(["peers"])
        result = measure(size, options.keep or Path(directory), lambda line: print(line, flush=True))
    text = to_markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers.md").write_text(text, encoding="utf-8")
    (options.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
