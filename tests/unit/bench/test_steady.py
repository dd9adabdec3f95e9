"""The pure parts of the steady state, and what the report says of calls and of bare calls."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bench.scale.gangs import (
    FULL_STEADY,
    LOG_LINES,
    TINY_STEADY,
    Layout,
    SteadySize,
    build_log,
    build_running_progress,
    compute_lags,
    step_at,
    summarize_latencies,
)
from bench.scale.report import targets, to_markdown
from bench.scale.steadyreport import steady_targets, to_lines
from lora_api import parse_progress_line

BEGIN = datetime(2026, 11, 30, 4, 0, tzinfo=UTC)
RESULTS = Path(__file__).parents[3] / "docs" / "benchmarks"


@pytest.mark.parametrize("size", [FULL_STEADY, TINY_STEADY])
def test_each_node_has_one_pod_of_each_gang_of_its_block_and_one_rank_zero(size: SteadySize) -> None:
    layout = size.layout
    pods = [(layout.node(gang, rank), rank) for gang in range(size.gangs) for rank in range(size.pods)]
    assert {node for node, _ in pods} == set(range(layout.nodes))
    assert all(len({layout.node(gang, rank) for rank in range(size.pods)}) == size.pods for gang in range(size.gangs))
    zeros = [node for node, rank in pods if rank == 0]
    assert len(zeros) == len(set(zeros)) == size.gangs


@pytest.mark.parametrize(
    ("layout", "dead", "silent"),
    [
        (Layout(gangs=8, pods=2, rack=2, hung=2), {0, 1}, {2, 3}),
        (Layout(gangs=8, pods=2, rack=0, hung=0), set(), set()),
        (Layout(gangs=4, pods=2, rack=1, hung=0), {0, 1}, set()),
    ],
)
def test_a_rack_takes_whole_gangs_and_a_hung_kubelet_one_log(layout: Layout, dead: set[int], silent: set[int]) -> None:
    assert layout.dead_gangs == dead
    assert layout.silent_gangs == silent


def test_as_many_logs_are_silent_as_kubelets_hang() -> None:
    assert len(FULL_STEADY.layout.dead_gangs) == 16
    assert len(FULL_STEADY.layout.silent_gangs) == FULL_STEADY.hung == 24


def test_a_log_ends_with_the_step_of_its_second_and_is_as_long_as_is_asked() -> None:
    lines = build_log(BEGIN, BEGIN + timedelta(seconds=1000.7)).splitlines()
    assert len(lines) == LOG_LINES
    last = parse_progress_line(lines[-1])
    assert last is not None
    assert (last.step, last.at) == (10_000, BEGIN + timedelta(seconds=1000))
    assert len(build_log(BEGIN, BEGIN + timedelta(seconds=3)).splitlines()) == 3


def test_progress_is_late_by_the_time_since_its_step() -> None:
    runs = [
        {"metadata": {"name": "told"}, "status": {"progress": {"step": 9_950}}},
        {"metadata": {"name": "untold"}, "status": {}},
        {"metadata": {"name": "other"}, "status": {"progress": {"step": 1}}},
    ]
    now = BEGIN + timedelta(seconds=1000)
    assert step_at(BEGIN, now) == 10_000
    assert compute_lags(runs, frozenset({"told", "untold"}), BEGIN, now) == [5.0, 1000.0]
    assert build_running_progress(BEGIN, now)["step"] == 10_000


def test_latencies_are_summed_up() -> None:
    assert summarize_latencies([float(number) for number in range(1, 201)]) == {
        "p50Ms": 101.0,
        "p99Ms": 199.0,
        "maxMs": 200.0,
    }


def window(**more: Any) -> dict[str, Any]:
    return {
        "seconds": 60, "newRuns": 60, "p50Ms": 20.0, "p99Ms": 80.0, "maxMs": 90.0, "operatorCores": 0.4,
        "rssMiB": 120.0, "peakMiB": 130.0, "callsPerSecond": {"get pods/log": 50.0}, "statusWritesPerSecond": 33.0,
        "logsUnread": 0, "lagSeconds": {"p50": 8.0, "p99": 20.0, "max": 22.0}, "load": 1.0,
    } | more  # fmt: skip


def steady(well: dict[str, Any], trouble: dict[str, Any], disturbed: int = 0) -> dict[str, Any]:
    return {
        "gangs": 500, "pods": 8, "nodes": 504, "rack": 16, "hung": 24, "deadGangs": 16, "deadGangsTold": 16,
        "silentGangs": 24, "secondsUntilAllSeen": 4.0, "well": well, "trouble": trouble, "disturbed": disturbed,
        "profile": {"samples": 2, "areas": {"kopf": 0.5}, "functions": {"reconcile.reconcile": 0.5}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("result", "missed"),
    [
        (steady(window(), window()), []),
        (steady(window(), window(maxMs=1000.0)), ["created"]),
        (steady(window(lagSeconds={"p50": 1, "p99": 31, "max": 40}), window()), ["progress"]),
        (steady(window(), window(), disturbed=1), ["gangs"]),
    ],
)
def test_a_steady_state_has_aims(result: dict[str, Any], missed: list[str]) -> None:
    assert [what.split(" ")[0] for what, _, _, ok in steady_targets(result) if not ok] == missed


def test_a_kind_of_call_that_comes_in_trouble_alone_is_told_too() -> None:
    text = "\n".join(to_lines(steady(window(), window(callsPerSecond={"list events": 2.0}))))
    assert "| `list events` a second | 0 | 2 |" in text
    assert "| `get pods/log` a second | 50 | 0 |" in text
    assert "| `kopf` | 50.0% | | `reconcile.reconcile` | 50.0% |" in text


@pytest.fixture
def published() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / "operator.json").read_text())
    result["lives"] = result["lives"][:1]
    return result


@pytest.mark.parametrize(
    ("key", "calls", "what", "reached"),
    [
        ("callsPerLaunch", 4, "a run of two nodes", True),
        ("callsPerLaunch", 5, "a run of two nodes", False),
        ("callsPerLaunchAlone", 3, "a run of one node", True),
        ("callsPerLaunchAlone", 4, "a run of one node", False),
        ("callsPerLife", 7, "a whole life", True),
        ("callsPerLife", 8, "a whole life", False),
    ],
)
def test_calls_have_aims(published: dict[str, Any], key: str, calls: int, what: str, *, reached: bool) -> None:
    published["lives"][0][key] = {"min": 1, "median": 1, "max": calls}
    (row,) = [row for row in targets(published) if what in row[0]]
    assert (row[2], row[3]) == (str(calls), reached)


@pytest.mark.parametrize(("rates", "share", "reached"), [([90.0], "0.9", True), ([80.0], "0.8", False)])
def test_a_burst_is_held_against_bare_calls_around_it(
    published: dict[str, Any], rates: list[float], share: str, *, reached: bool
) -> None:
    published["burst"] = [{**published["burst"][0], "perSecond": rate} for rate in rates]
    bare = published["floor"][0]
    published["floor"] = [{**bare, "burst": {**bare["burst"], "perSecond": rate}} for rate in (120.0, 80.0)]
    (row,) = [row for row in targets(published) if "bare calls" in row[0]]
    assert row[2:] == (share, reached)


def test_a_page_tells_a_launch_by_kind_and_the_steady_state(published: dict[str, Any]) -> None:
    published.pop("steady", None)  # the page in the repository has one
    assert "A steady state" not in to_markdown(published)
    published["lives"][0]["launchByKind"] = {"create jobs": 1.0, "patch lorafinetunes/status": 1.25}
    published["steady"] = steady(window(), window())
    text = to_markdown(published)
    assert "A launch of two nodes: 1 x `create jobs`, 1.25 x `patch lorafinetunes/status`." in text
    assert "## A steady state" in text
