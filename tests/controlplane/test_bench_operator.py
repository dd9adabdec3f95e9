"""The bench of the operator, small: what a run costs in calls is held here, whatever the machine."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.scale.gangs import UNTOLD_SECONDS
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
    assert lives["callsPerLaunchAlone"]["max"] <= 3, lives["launchAloneByKind"]
    assert lives["launchAloneByKind"].keys() == {
        "create networkpolicies",
        "create jobs",
        "patch lorafinetunes/status",
    }, "without peers no Service"
    assert lives["callsPerLife"]["max"] <= 7, lives["oneLife"]
    assert burst["callsPerRun"] <= 5, "four, and one Event"
    trouble = result["trouble"]
    assert trouble["succeededAtFirstAttempt"] == trouble["runs"] == trouble["jobsMade"] == 4
    assert trouble["refused"] > 0
    assert trouble["late"] > 0
    assert all(sum(result["profile"][part]["areas"].values()) > 0.5 for part in ("start", "burst"))
    check_steady(result["steady"])
    before, floor = result["floor"]
    assert before["burst"]["etcdCpuMsPerRun"] > 0
    assert floor["launches"]["touchedAgainUs"] > 0
    assert floor["burst"]["callsPerRun"] >= 4, "the same calls; the last Events may come too late to be counted"
    assert to_markdown(result) == (tmp_path / "operator.md").read_text()
    # Shares of bare calls are times, and of a few runs say nothing.
    counted = [(what, ok) for what, _, _, ok in targets(result) if re.search("calls|writes|lost", what)]
    assert [what for what, ok in counted if not ok and "bare calls" not in what] == []


def check_steady(steady: dict[str, Any]) -> None:
    """Of times only that they are there: they are the machine's."""
    well, ill = steady["well"], steady["trouble"]
    assert (steady["deadGangs"], steady["silentGangs"], steady["disturbed"]) == (2, 2, 0)
    assert well["newRuns"] == ill["newRuns"] == 12, "each has its Job, or the bench ends with an error"
    assert well["logsUnread"] == 0
    assert ill["logsUnread"] > 0, "kubelets hang"
    assert all(part["callsPerSecond"]["get pods/log"] > 0 for part in (well, ill))
    assert all(part["statusWritesPerSecond"] > 0 for part in (well, ill))
    assert all(0 <= part["lagSeconds"]["max"] < UNTOLD_SECONDS for part in (well, ill)), "all logs are read"
