"""What may be the fault of one node is tried on another one, once."""

from dataclasses import replace
from typing import Any

import pytest

from lora_api import RULES, ConditionType, FailureClass, Phase
from lora_operator.lifecycle.decide import decide
from lora_operator.state.plan import Plan
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import NOW, a_job, a_run, ago, ended, failure, said, seen, stamp
from tests.unit.operator.cases import SETTINGS

DRIVER = "OCI runtime create failed: nvidia-container-cli: driver rpc error: timed out"


def unstarted(index: int, node: str) -> PodView:
    return ended(index, 128, DRIVER, reason="StartError", node=node, attempt=2, job_uid="job-2")


def lost(index: int, node: str = "ok") -> PodView:
    return ended(index, 73, said("PeerLost"), node=node, attempt=2, job_uid="job-2")


def failed_before(failure_class: str, node: str | None, reason: str = "", seconds: float = 60) -> dict[str, Any]:
    return {**failure(1, failure_class), "node": node, "reason": reason, "at": stamp(ago(seconds))}


def decided(pods: list[PodView], *before: dict[str, Any], **status: Any) -> Plan:
    counted = {"recentFailures": len(before)} if before else {}
    run = a_run(status={"attempt": 2, "failures": list(before), **counted, **status})
    return decide(seen(run, a_job(2), *pods), NOW, SETTINGS)


START = FailureClass.POD_NOT_STARTED
CASES: dict[str, tuple[list[PodView], list[dict[str, Any]], dict[str, Any], bool, str]] = {
    "one node cannot start a container": (
        [unstarted(0, "n1"), lost(1)], [], {}, True,
        "The next attempt avoids node n1. If another node",
    ),
    "and another one cannot either": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", "n7", "StartError")], {}, False,
        "(node n7 said so too)",
    ),
    "the same one speaks for no other": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", "n1", "StartError")], {}, True,
        "The next attempt avoids node n1. If another node",
    ),
    "until it has said so three times, as no other takes the pods": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", "n1", "StartError")] * 2, {}, False,
        "(the 3rd time, and no other node took the pod)",
    ),
    "what a preflight needs says nothing of the gang": (
        [unstarted(0, "n1"), lost(1)], [{**failed_before("PodNotStarted", "n7", "StartError"), "attempt": 0}], {},
        True, "",
    ),
    "a run that has worked goes on": (
        [unstarted(0, "n1"), lost(1)], [], {"lastCheckpoint": {"step": 5, "at": stamp(ago(30))}}, True,
        "avoids node n1. If another node says the same: Correct",
    ),
    "two nodes of one gang cannot": ([unstarted(0, "n1"), unstarted(1, "n2")], [], {}, False, "(node n2 said so too)"),
    "a Secret that was missing said nothing of a node": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", None, "PodNotStarted")], {}, True, "",
    ),
    "a checkpoint since then begins anew": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", "n7", "StartError", 60)],
        {"lastCheckpoint": {"step": 5, "at": stamp(ago(30))}, "recentFailures": 1}, True, "",
    ),
    "and so does a larger retry": (
        [unstarted(0, "n1"), lost(1)], [failed_before("PodNotStarted", "n7", "StartError")],
        {"recentFailures": None, "retriedAttempts": 1}, True, "",
    ),
    "a node that nobody knows is not avoided": ([unstarted(0, ""), lost(1)], [], {}, False, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_one_node_cannot_do_is_tried_on_another(name: str) -> None:
    pods, before, status, again, words = CASES[name]
    plan = decided(pods, *before, **status)
    assert plan.phase is (Phase.RESTARTING if again else Phase.FAILED)
    assert plan.failed is not None
    assert plan.failed.failure.failure_class is START
    assert not plan.failed.charged
    assert words in plan.message
    if again:
        assert [node.name for node in plan.failed.avoided or ()] == ["n1"]


@pytest.mark.parametrize(
    "failure_class", [FailureClass.GPU_UNSUPPORTED, FailureClass.LIMIT_TOO_LOW, FailureClass.DISK_FULL]
)
def test_a_driver_a_limit_or_a_disk_may_be_that_of_one_node(failure_class: FailureClass) -> None:
    low = ended(0, 82, said(failure_class, "it is too old"), node="n1", attempt=2, job_uid="job-2")
    other = ended(1, 82, said(failure_class, "it is too old"), node="n2", attempt=2, job_uid="job-2")
    again = decided([low, lost(1)])
    assert again.failed is not None
    assert (again.phase, again.failed.charged) == (Phase.RESTARTING, False)
    assert [node.name for node in again.failed.avoided or ()] == ["n1"]
    for plan in (
        decided([low, other]),
        decided([low, lost(1)], failed_before(failure_class, "n7")),
        decided([replace(low, node=""), lost(1)]),
    ):
        assert plan.phase is Phase.FAILED
        assert plan.failure is not None
        assert plan.failure.remedy == RULES[failure_class].remedy


def test_a_long_remedy_has_room_for_what_comes_before_it() -> None:
    """The API server would refuse a longer one, and with it the whole status."""
    old = ended(
        0, 82, said("GPUUnsupported", "it is too old", remedy="x" * 1024), node="n1", attempt=2, job_uid="job-2"
    )
    plan = decided([old, lost(1)])
    assert plan.failure is not None
    assert len(plan.failure.remedy) == 1024
    assert plan.failure.remedy.startswith("The next attempt avoids node n1.")


def test_the_node_of_a_container_that_does_not_start_is_said() -> None:
    plan = decided([unstarted(0, "n1"), lost(1)])
    assert plan.message.startswith(f"The container of pod tickets-2-0 did not start on node n1: {DRIVER}")
    assert plan.conditions[ConditionType.RUNNING].reason == "PodNotStarted"


def out_of_memory(index: int, node: str) -> PodView:
    return ended(index, 137, reason="OOMKilled", memory_limited=False, node=node, attempt=2, job_uid="job-2")


NO_MEMORY = failed_before("Evicted", "n7", "NodeOutOfMemory")
FULL: dict[str, tuple[list[PodView], list[dict[str, Any]], bool]] = {
    "one node has no memory left": ([out_of_memory(0, "n1"), lost(1)], [], True),
    "a pod that was preempted beside it says nothing of that": (
        [out_of_memory(0, "n1"), replace(lost(1, "n2"), disruption="PreemptionByScheduler")], [], True,
    ),
    "nor does one that was preempted before": (
        [out_of_memory(0, "n1"), lost(1)], [failed_before("Evicted", "n7", "PreemptionByScheduler")], True,
    ),
    "two nodes of the gang are the run's own": ([out_of_memory(0, "n1"), out_of_memory(1, "n2")], [], False),
    "and so are two in turn": ([out_of_memory(0, "n1"), lost(1)], [NO_MEMORY], False),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_a_node_without_memory_left_is_tried_once_elsewhere(name: str) -> None:
    pods, before, again = FULL[name]
    plan = decided(pods, *before)
    assert plan.failed is not None
    assert (plan.phase, plan.reason) == (Phase.RESTARTING if again else Phase.FAILED, "Evicted")
    assert not plan.failed.charged
    assert "n1" in [node.name for node in plan.failed.avoided or ()]
    said_so = "If another node says the same, the run ends: See what else runs" if again else "said so too"
    assert said_so in plan.message


@pytest.mark.parametrize(
    "words",
    [
        "Pod ephemeral local storage usage exceeds the total limit of containers 2Gi. ",
        'Container trainer exceeded its local ephemeral storage limit "2Gi". ',
        'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". ',
    ],
)
def test_a_pod_that_passes_its_own_limit_of_disk_does_so_everywhere(words: str) -> None:
    full = ended(0, 137, node="n1", attempt=2, job_uid="job-2")
    plan = decided([replace(full, reason="Evicted", message=words, disruption="TerminationByKubelet"), lost(1)])
    assert (plan.phase, plan.reason) == (Phase.FAILED, "DiskFull")
    assert plan.failed is not None
    assert not plan.failed.avoided
    assert words.strip(". ") in plan.message
