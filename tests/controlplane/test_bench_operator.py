"""The bench of the operator, small: what a run costs in calls is held here, whatever the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scale.process import ROOT, build_environment
from bench.scale.report import targets, to_markdown

pytestmark = pytest.mark.controlplane


def test_the_operator_keeps_to_its_budget_of_calls_and_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, as the soak."""
    command = [sys.executable, "-m", "bench.scale", "--tiny", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=build_environment(), timeout=540, check=True)
    result = json.loads((tmp_path / "operator.json").read_text())
    (restart,), (idle,), (burst,), (lives,) = (result[part] for part in ("restart", "idle", "burst", "lives"))
    assert restart["writes"] == 0, restart["calls"]
    assert {call.split(" ")[0] for call in restart["calls"]} <= {"list", "get"}
    assert idle["calls"] == 0
    assert lives["callsPerLaunch"]["max"] <= 4, lives["oneLife"]
    assert lives["callsPerLife"]["max"] <= 7, lives["oneLife"]
    assert burst["callsPerRun"] <= 5, "four, and one Event"
    trouble = result["trouble"]
    assert trouble["succeededAtFirstAttempt"] == trouble["runs"] == trouble["jobsMade"] == 4
    assert trouble["refused"] > 0
    assert trouble["late"] > 0
    assert all(sum(result["profile"][part]["areas"].values()) > 0.5 for part in ("start", "burst"))
    before, floor = result["floor"]
    assert before["burst"]["etcdCpuMsPerRun"] > 0
    assert floor["launches"]["touchedAgainUs"] > 0
    assert floor["burst"]["callsPerRun"] >= 4, "the same calls; the last Events may come too late to be counted"
    assert to_markdown(result) == (tmp_path / "operator.md").read_text()
    reached = {what for what, _, _, ok in targets(result) if ok}
    assert {what for what, *_ in targets(result) if "calls" in what or "writes" in what or "lost" in what} <= reached
