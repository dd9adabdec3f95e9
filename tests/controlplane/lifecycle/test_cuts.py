"""Every lifecycle ends the same, whichever call was the last one that an operator could make.

The restart after a failure, suspension, preflight and runtimes have this test beside their others.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

import devcluster
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_interruptions import jobs_created
from tests.support.api import Api, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

SECONDS = 60.0
AT_ONCE = 4


def succeed(run: Run, attempt: int) -> None:
    run.set_succeeded(attempt)


def fail(failure_class: str, exit_code: int) -> Callable[[Run, int], None]:
    return lambda run, attempt: run.set_failed(attempt, failure_class, exit_code)


def go_on(run: Run, attempt: int) -> None:
    """Runs for ever."""


def evict(run: Run, attempt: int) -> None:
    """Rank 1 is taken off its node, and rank 0 loses its peer."""
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain"}
    pod = run.gang(attempt)[1]
    run.set_pod(pod, {**ended(137), "conditions": [{"type": "PodScheduled", "status": "True"}, taken]})
    run.set_ended(attempt, 0, 73)


@dataclass(frozen=True)
class Life:
    """What becomes of each attempt's pods, and where that has to end.

    ``charged`` counts restarts; ``cleared`` says that nothing is left of the children.
    """

    ends: Mapping[int, Callable[[Run, int], None]]
    phase: str
    failures: tuple[str, ...] = ()
    charged: int = 0
    policy: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    cleared: bool = False


LIVES = {
    "success": Life({1: succeed}, "Succeeded"),
    "what no restart helps": Life({1: fail("BadData", 65)}, "Failed", ("BadData",)),
    "no restarts are left": Life(
        {1: fail("Internal", 70), 2: fail("PeerLost", 73)},
        "Failed",
        ("Internal", "PeerLost"),
        charged=1,
        policy={"maxRestarts": 1},
    ),
    "eviction": Life({1: evict, 2: succeed}, "Succeeded", ("Evicted",)),
    "less memory": Life(
        {1: fail("GPUOutOfMemory", 71), 2: succeed},
        "Succeeded",
        ("GPUOutOfMemory",),
        policy={"onOutOfMemory": "shrinkMicroBatch", "maxRestarts": 0},
        status={"microBatchSize": 2},
    ),
    "deadline, then clearing up": Life(
        {1: go_on},
        "Failed",
        ("DeadlineExceeded",),
        policy={"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 0},
        cleared=True,
    ),
    "children are cleared up": Life({1: succeed}, "Succeeded", policy={"ttlSecondsAfterFinished": 0}, cleared=True),
}


def is_at_end(run: Run, life: Life, status: Raw) -> bool:
    if status.get("phase") != life.phase:
        return False
    if not life.cleared:
        return True
    marked = any(item["type"] == "CleanedUp" for item in status["conditions"])
    return marked and not (run.jobs() or run.services() or run.policies())


def play(run: Run, life: Life, is_over: Callable[[], bool]) -> None:
    """Plays the nodes, from wherever the pods are, until ``is_over`` or the end."""

    def step() -> bool:
        status = run.status
        if is_over() or is_at_end(run, life, status):
            return True
        for attempt, end in life.ends.items():
            pods = run.pods(attempt)
            phases = {pod["status"]["phase"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}
            if len(pods) == 2 and "Pending" in phases:
                run.set_running(attempt)
            elif len(pods) == 2 and "Running" in phases:
                end(run, attempt)
        return False

    eventually("the cut or the end", step, SECONDS)


def check_end(run: Run, life: Life) -> None:
    status = run.wait("the end", lambda status: is_at_end(run, life, status), SECONDS)
    attempts = len(life.ends)
    assert (status["attempt"], status.get("chargedRestarts", 0)) == (attempts, life.charged)
    assert tuple(failure["class"] for failure in status.get("failures", [])) == life.failures, status["failures"]
    assert life.status.items() <= status.items()
    if not life.cleared:
        assert [item["metadata"]["name"] for item in run.services()] == ["run-gang"]
    reasons = [event["reason"] for event in run.events()]
    assert reasons.count(life.phase) <= 1, reasons


@pytest.mark.parametrize("name", LIVES)
def test_an_operator_cut_after_any_call_is_continued_by_the_next(
    cp: devcluster.ControlPlane,
    api: Api,
    make_namespace: Callable[[], str],
    fast_settings: Callable[..., Settings],
    name: str,
) -> None:
    life = LIVES[name]

    def live_with_cut(k: int | None) -> int:
        namespace = make_namespace()
        run = Run(api, namespace).create(lambda spec: spec.update(runPolicy=dict(life.policy)))
        settings = fast_settings(namespace, log_interval=60.0, progress_interval=60.0)
        first = OperatorThread(settings, cut_after=k).start()
        try:
            play(run, life, lambda: first.is_cut)
        finally:
            first.stop()
        with OperatorThread(settings):
            play(run, life, lambda: False)
            check_end(run, life)
        assert jobs_created(cp, namespace) == [f"run-{number + 1}" for number in range(len(life.ends))], f"k={k}"
        return len(first.calls)

    calls = live_with_cut(None)
    assert 8 <= calls <= 50, calls
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(live_with_cut, range(1, calls + 1)))
