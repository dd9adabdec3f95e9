"""``python -m bench.gpu``: all parts in order; each finished one is written at once."""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu.packing import packing
from bench.gpu.parts import ENDED_IN_TIME, Machine, facts, large, levers, out_of_memory, parity, speed

PARTS = {
    "facts": facts,
    "parity": parity,
    "packing": packing,
    "speed": speed,
    "large": large,
    "outOfMemory": out_of_memory,
    "levers": levers,
}
"""In order: what has to be known first, and the levers in the time that the others leave."""
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
LIMIT_SECONDS = 525
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "triton",
    "flash-attn",
)


def versions() -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def run_parts(machine: Machine, names: Sequence[str], file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Runs the parts; ``file`` is written anew after each result."""
    result: dict[str, Any] = {**head, **{name: {} for name in names}}

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name in names:

        def report(what: str, found: dict[str, Any], part: str = name) -> None:
            result[part][what] = found
            print(f"{part}: {what}: {json.dumps(found)}", flush=True)
            write()

        if machine.left < ENDED_IN_TIME:
            report("not begun", {"failed": "no time was left"})
        else:
            PARTS[name](machine, report)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. The exit code is 1 where some part failed."""
    parser = argparse.ArgumentParser(description="Benchmark the trainer on one GPU machine.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a trial of the benchmark itself")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument(
        "--seconds", type=float, default=LIMIT_SECONDS, help="limit of the whole (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here that torch can use; --device cpu --tiny tries the benchmark itself")
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu-{platform.machine()}"
    file = options.out / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    head = {"device": name, "tiny": options.tiny, "python": platform.python_version(), "versions": versions()}
    with tempfile.TemporaryDirectory() as directory:
        deadline = time.monotonic() + options.seconds
        machine = Machine(options.device, options.tiny, Path(directory), deadline)
        result = run_parts(machine, options.parts, file, head)
    print(f"written to {file}")
    return int(any("failed" in found for part in options.parts for found in result[part].values()))


if __name__ == "__main__":
    sys.exit(main())
