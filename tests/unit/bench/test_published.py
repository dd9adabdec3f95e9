"""The published results are what the benchmarks wrote, and what is said elsewhere of them is true."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.peers import report as peers
from bench.scale import report as scale
from bench.soak import report as soak

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "benchmarks"


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


PAGES = {"operator": scale.to_markdown, "soak": soak.to_markdown, "peers": peers.to_markdown}


@pytest.mark.parametrize(
    ("name", "to_markdown"), [page for page in PAGES.items() if (RESULTS / f"{page[0]}.json").exists()]
)
def test_a_page_is_written_from_its_numbers(name: str, to_markdown: Callable[[dict[str, Any]], str]) -> None:
    assert (RESULTS / f"{name}.md").read_text() == to_markdown(read(name))


def test_the_charts_memory_fits_what_was_measured() -> None:
    values = (ROOT / "charts/lora-operator/values.yaml").read_text()
    told = re.search(r"10,000 resident runs take about (\d+) MiB", values)
    limit = re.search(r"^resources:.*?limits:\n    memory: (\d+)Mi", values, re.MULTILINE | re.DOTALL)
    assert told
    assert limit
    peak = max(numbers["peakMiB"] for numbers in read("operator")["restart"])
    assert 0.9 * int(told[1]) <= peak <= 1.1 * int(told[1])
    assert 2 * peak <= int(limit[1])
