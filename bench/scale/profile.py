"""From the samples of ``sampled`` to shares of the processor time. All pure but for reading the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench.scale.sampled import Stack

Samples = list[tuple[int, Stack]]

_OWN = "/lora_operator/"
_PACKAGES = ("kopf", "kubernetes", "aiohttp", "yarl", "multidict", "pydantic", "prometheus_client", "uvloop")


def read_samples(path: Path) -> Samples:
    """Counts and stacks."""
    return [(count, tuple(stack)) for count, *stack in json.loads(path.read_text())]


def area(stack: Stack) -> str:
    """Whose work a sample is: a module of ours, or a package. The standard library works for its caller."""
    for frame in stack:
        file = frame.rpartition(":")[0]
        if file.endswith("/lora_operator/main.py"):
            return "uvloop"  # what runs below it without a frame of its own is the loop's C code
        if _OWN in file:
            return "lora_operator." + file.partition(_OWN)[2].removesuffix(".py").replace("/", ".")
        if "/lora_api/" in file:
            return "lora_api"
        for package in _PACKAGES:
            if f"/{package}/" in file:
                return package
    return "asyncio"


def functions(stack: Stack) -> set[str]:
    """Our functions on a stack."""
    found = set()
    for frame in stack:
        file, _, name = frame.rpartition(":")
        if _OWN in file and "/main.py" not in file and not name.startswith("<"):
            found.add(f"{file.partition(_OWN)[2].removesuffix('.py').replace('/', '.')}.{name}")
    return found


def summarize(samples: Samples) -> dict[str, Any]:
    """Shares of the processor time by area, and by our functions with all that they call; the largest first."""
    total = sum(count for count, _ in samples)
    areas: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    for count, stack in samples:
        areas[area(stack)] += count
        for function in functions(stack):
            ours[function] += count
    return {"samples": total, "areas": _shares(areas, total, 14), "functions": _shares(ours, total, 16)}


def to_table(profile: dict[str, Any]) -> list[str]:
    """A summary for people."""
    left, right = (list(profile[kind].items()) for kind in ("areas", "functions"))
    lines = ["| module or package | share | | function | share |", "| --- " * 5 + "|"]
    for row in range(max(len(left), len(right))):
        cells = [f"`{rows[row][0]}` | {rows[row][1]:.1%}" if row < len(rows) else " | " for rows in (left, right)]
        lines.append(f"| {cells[0]} | | {cells[1]} |")
    return lines


def _shares(counts: Counter[str], total: int, most: int) -> dict[str, float]:
    return {name: round(count / max(total, 1), 3) for name, count in counts.most_common(most)}
