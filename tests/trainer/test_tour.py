"""The tour of docs/training.md, line by line, as a reader runs it."""

import os
import re
import subprocess
from pathlib import Path

from lora_api.messages import parse_termination

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "training.md"


def read_commands() -> list[str]:
    """The indented lines of the tour."""
    tour = DOCUMENT.read_text().split("<!-- tour -->")[1].split("<!-- end of tour -->")[0]
    return [line.removeprefix("    ") for line in tour.splitlines() if line.startswith("    ")]


def test_every_line_of_the_tour_works(tmp_path: Path) -> None:
    commands = read_commands()
    assert len(commands) >= 9
    there = tmp_path / "tour"
    script = "\n".join(["set -eu -o pipefail", *commands]).replace("/tmp/tour", str(there))
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    words = parse_termination((there / "last-words").read_text())
    assert words is not None
    assert words.adapter is not None
    assert words.adapter.eval_loss_after is not None
    measured = re.search(r"evaluation loss ([0-9.]+) on 16 records", ran.stdout)
    assert measured is not None, ran.stdout
    assert abs(float(measured[1]) - words.adapter.eval_loss_after) < 1e-3
    assert "preflight passed" in ran.stderr
    assert ran.stdout.rstrip().endswith("v1.json")
    assert words.adapter.version == 1
