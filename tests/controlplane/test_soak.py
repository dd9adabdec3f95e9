"""The soak, short: 32 runs, one of every kind of story, and a minute of faults and upgrades."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scale.process import ROOT, build_environment
from bench.soak.kinds import KINDS
from bench.soak.report import to_markdown
from bench.soak.upgrades import STEPS

pytestmark = pytest.mark.controlplane


def test_every_run_ends_as_its_story_says_whatever_fails(tmp_path: Path) -> None:
    """In a process of its own: connections that break at any moment leave warnings, which are errors here."""
    command = [sys.executable, "-m", "bench.soak", "--tiny", "--seed=1", f"--out={tmp_path}"]
    code = subprocess.run(command, cwd=ROOT, env=build_environment(), timeout=540, check=False).returncode
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["wrong"] == []
    assert code == 0
    assert result["runs"] == sum(result["ends"].values()) == 32
    assert set(result["kinds"]) == set(KINDS)
    assert len(result["upgrades"]) == len({(what, release) for _, what, release in STEPS})
    assert result["sidecars"] > 0
    assert len(result["faults"]) >= 8
    assert result["requests"]["passed"] > 100
    assert to_markdown(result) == (tmp_path / "soak.md").read_text()
