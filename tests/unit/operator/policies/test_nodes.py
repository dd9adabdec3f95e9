"""Which nodes the next attempts avoid, and for how long."""

from datetime import timedelta
from typing import Any

import pytest

from lora_api import Failure, FailureClass, Phase
from lora_operator.children.job import build_job
from lora_operator.diagnosis.findings import Symptom
from lora_operator.lifecycle.decide import decide
from lora_operator.policies.nodes import avoid, describe_forgotten, forget_old
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Reports
from lora_operator.status.compute import compute_status
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, ended, said, seen, stamp
from tests.unit.operator.cases import SETTINGS

LOST, REFUSED = FailureClass.NODE_LOST, FailureClass.POD_LOST


def failed(failure_class: FailureClass, reason: str = "", node: str | None = "n1") -> Failure:
    return Failure(attempt=1, failure_class=failure_class, reason=reason, node=node, at=NOW)


def symptom(failure_class: FailureClass, reason: str, node: str) -> Symptom:
    return Symptom(failure_class, reason, "", ended(1, node=node))


def rejected(reason: str, message: str, failure_class: FailureClass) -> Symptom:
    pod = a_pod(1, scheduled=True, phase="Failed", reason=reason, message=message, node="n1")
    return Symptom(failure_class, reason, message, pod)


def known(name: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "reason": "GPUFault", "since": stamp(ago(seconds))}


OLD = [known(f"old-{number}", 80_000 - number) for number in range(20)]
CASES: dict[str, tuple[Failure, list[Symptom], list[dict[str, Any]], list[tuple[str, str]]]] = {
    "a node that is lost": (failed(LOST, "NodeLost"), [], [], [("n1", "NodeLost")]),
    "a node whose GPU failed": (failed(FailureClass.GPU_FAULT), [], [], [("n1", "GPUFault")]),
    "a node whose device plugin is away": (failed(REFUSED, "UnexpectedAdmissionError"), [], [], [("n1", "PodLost")]),
    "a node that has no GPU left, whatever its name": (
        failed(REFUSED, "OutOfnvidia.com/gpu"), [], [], [("n1", "PodLost")],
    ),
    **{
        f"a node that refuses a pod: {reason}": (failed(REFUSED, reason), [], [], [("n1", "PodLost")])
        for reason in ("AppArmor", "InvalidNodeInfo", "PodLevelResourcesNotAdmittedReason", "SysctlForbidden",
                       "PodOSSelectorNodeLabelDoesNotMatch", "VolumeAttachmentLimitExceeded")
    },
    **{
        f"a node that loses a pod: {reason}": (failed(REFUSED, reason), [], [], [("n1", "PodLost")])
        for reason in ("ContainerStatusUnknown", "Unknown")
    },
    "a node that refuses pods as it shuts down": (
        failed(FailureClass.EVICTED, "NodeShutdown"),
        [rejected("NodeShutdown", "Pod was rejected as the node is shutting down.", FailureClass.EVICTED)],
        [], [("n1", "Evicted")],
    ),
    "one that ended its pods as it shut down": (
        failed(FailureClass.EVICTED, "Terminated"),
        [rejected("Terminated", "Pod was terminated in response to imminent node shutdown.", FailureClass.EVICTED)],
        [], [],
    ),
    "a node that refuses a pod for a reason of a later kubelet": (
        failed(REFUSED, "NotInTheMood"), [rejected("NotInTheMood", "Pod was rejected: no", REFUSED)],
        [], [("n1", "PodLost")],
    ),
    "a node that had no memory left": (failed(FailureClass.EVICTED, "NodeOutOfMemory"), [], [], [("n1", "Evicted")]),
    "a node whose disk is full": (failed(FailureClass.DISK_FULL, "Error"), [], [], [("n1", "DiskFull")]),
    "but not one whose pod passed its own limit": (failed(FailureClass.DISK_FULL, "DiskLimitExceeded"), [], [], []),
    "a pod that somebody deleted says nothing of its node": (failed(REFUSED, "Deleted"), [], [], []),
    "nor does a preemption": (failed(FailureClass.EVICTED, "PreemptionByScheduler"), [], [], []),
    "nor does a crash": (failed(FailureClass.INTERNAL, "Error"), [], [], []),
    "a failure whose node nobody knows": (failed(LOST, "NodeLost", None), [], [], []),
    "all that refused a pod in one attempt": (
        failed(REFUSED, "UnexpectedAdmissionError"),
        [symptom(REFUSED, "UnexpectedAdmissionError", "n2"), symptom(FailureClass.PEER_LOST, "Error", "n3")],
        [], [("n1", "PodLost"), ("n2", "PodLost")],
    ),
    "those of earlier attempts": (failed(LOST), [], [known("n9", 60)], [("n9", "GPUFault"), ("n1", "NodeLost")]),
    "those too where this attempt failed otherwise": (
        failed(FailureClass.INTERNAL), [], [known("n9", 60)], [("n9", "GPUFault")],
    ),
    "a day later they are forgotten": (failed(LOST), [], [known("n9", 86_400)], [("n1", "NodeLost")]),
    "one that fails again is the newest": (
        failed(LOST), [], [known("n1", 60), known("n9", 60)], [("n9", "GPUFault"), ("n1", "NodeLost")],
    ),
    "the oldest of more than 20 is forgotten": (
        failed(LOST), [], OLD, [*((str(one["name"]), "GPUFault") for one in OLD[1:]), ("n1", "NodeLost")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nodes_that_are_avoided(name: str) -> None:
    failure, symptoms, before, want = CASES[name]
    found = avoid(a_run(status={"avoidedNodes": before}).status, failure, symptoms, NOW)
    assert [(node.name, node.reason) for node in found] == want
    assert all(node.since == NOW for node in found if node.reason != "GPUFault")


def test_nodes_that_are_forgotten_are_named() -> None:
    nodes = a_run(status={"avoidedNodes": [known("n1", 5), known("n2", 5)]}).status.avoided_nodes or []
    assert describe_forgotten(nodes) == "; the nodes that were avoided may be used again: n1, n2"
    assert describe_forgotten([]) == ""


def test_a_run_that_goes_on_forgets_them_too() -> None:
    plan = Plan(phase=Phase.RUNNING, reason="Running", attempt=2)
    run = a_run(status={"attempt": 2, "avoidedNodes": [known("n1", 86_400), known("n2", 60)]})
    assert [node.name for node in compute_status(run, plan, Reports(), NOW).avoided_nodes or []] == ["n2"]


def test_the_node_that_ended_a_run_is_avoided_once_it_is_tried_again() -> None:
    bad = ended(1, 81, said("GPUUnavailable"), node="n1")
    run = a_run(status={"attempt": 1, "avoidedNodes": [known("n9", 60)]}, runPolicy={"maxRestarts": 0})
    plan = decide(seen(run, a_job(), ended(0, 73, said("PeerLost"), node="n2"), bad), NOW, SETTINGS)
    assert plan.ended
    failed = compute_status(run, plan, Reports(), NOW)
    policy = {"maxRestarts": 0, "retry": 1}
    again = a_run(status=failed.model_dump(mode="json", by_alias=True, exclude_none=True), runPolicy=policy)
    status = compute_status(again, decide(seen(again), NOW, SETTINGS), Reports(), NOW)
    assert status.phase is Phase.RESTARTING
    assert [node.name for node in status.avoided_nodes or []] == ["n9", "n1"]


def test_a_run_that_was_suspended_for_a_day_keeps_away_from_nothing() -> None:
    """Its status was written before that."""
    run = a_run(status={"attempt": 1, "avoidedNodes": [known("n1", 86_400), known("n2", 86_399)]})
    assert [node.name for node in forget_old(run, NOW).status.avoided_nodes or ()] == ["n2"]
    later = forget_old(run, NOW + timedelta(seconds=1))
    assert later.status.avoided_nodes is None
    assert "affinity" not in build_job(later, 2, SETTINGS)["spec"]["template"]["spec"]
    assert forget_old(later, NOW) is later
