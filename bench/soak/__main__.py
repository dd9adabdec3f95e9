"""``python -m bench.soak``: soaks the operator, and writes soak.json and soak.md."""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.scale.process import ROOT
from bench.soak.report import to_markdown
from bench.soak.soak import FULL, TINY, Soak
from devcluster import control_plane

RESULTS = ROOT / "docs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. 1: something is not as it has to be."""
    parser = argparse.ArgumentParser(prog="bench.soak", description="Soak the operator in faults.")
    parser.add_argument("--tiny", action="store_true", help="a few runs in a minute")
    parser.add_argument("--seed", type=int, default=1, help="what happens is a function of it, but for times")
    parser.add_argument("--minutes", type=float, help="how long it takes, the settling aside")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory to write soak.md and soak.json to")
    parser.add_argument("--keep", type=Path, help="directory for data and logs of the control plane (default: removed)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    size = TINY if options.tiny else FULL
    if options.minutes is not None:
        size = replace(size, seconds=60 * options.minutes, runs=round(size.runs * 60 * options.minutes / size.seconds))
    with tempfile.TemporaryDirectory() as directory:
        where = options.keep or Path(directory) / "plane"
        # Not on uvloop: it has aborted this process when the API server was killed under the proxy's connections.
        with control_plane(where, controller_manager=True, audit_log=True) as plane:
            result = asyncio.run(Soak(plane, size, options.seed, lambda line: print(line, flush=True)).run())
    text = to_markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.md").write_text(text, encoding="utf-8")
    (options.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
