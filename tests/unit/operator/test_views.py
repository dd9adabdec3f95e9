"""What is seen of a pod that others have put containers into, and of one that only looks like ours."""

from collections.abc import Mapping, Set
from typing import Any

import pytest

from lora_operator.watched.views import PodView, parse_pod
from tests.unit.operator.builders import NOW
from tests.unit.operator.test_cache import AT, a_raw_pod

Raw = dict[str, Any]
RUNS: Raw = {"running": {"startedAt": AT}}
DONE: Raw = {"terminated": {"exitCode": 0, "reason": "Completed"}}
BEGINS: Raw = {"waiting": {"reason": "PodInitializing"}}
NO_IMAGE: Raw = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
CRASHES: Raw = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
SIDECARS = ("istio-proxy",)


def failed(code: int = 1, reason: str = "Error", message: str = "") -> Raw:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": AT}}


NONE: Mapping[str, Raw] = {}


def view(
    trainer: Raw | None,
    *,
    init: Mapping[str, Raw] = NONE,
    others: Mapping[str, Raw] = NONE,
    unstarted: Set[str] = frozenset(),
    **status: Any,
) -> PodView:
    """A pod as the kubelet tells of it: it sorts containers by name, and init containers as they are in the pod."""
    containers = sorted({**others, **({} if trainer is None else {"trainer": trainer})}.items())
    raw = a_raw_pod(
        spec={
            "initContainers": [
                {"name": name, **({"restartPolicy": "Always"} if name in SIDECARS else {})} for name in init
            ]
        },
        status={
            "initContainerStatuses": [
                {"name": name, "state": state, "started": name not in unstarted} for name, state in init.items()
            ],
            "containerStatuses": [{"name": name, "state": state} for name, state in containers],
            **status,
        },
    )
    return parse_pod(raw)


def told(pod: PodView) -> tuple[str, str, bool, str | None]:
    """What it waits for, in which init container, whether the trainer runs, and how trainer or init container ended."""
    end = pod.ended and f"{pod.ended.init_container}:{pod.ended.exit_code}"
    return pod.waiting_reason, pod.init_container, pod.running, end


STATES: dict[str, tuple[PodView, tuple[str, str, bool, str | None]]] = {
    "nothing is known yet": (view(None), ("", "", False, None)),
    "a sidecar runs, the trainer does not yet": (
        view(BEGINS, others={"istio-proxy": RUNS}), ("PodInitializing", "", False, None),
    ),
    "a sidecar runs, and the trainer has no image": (
        view(NO_IMAGE, others={"istio-proxy": RUNS}), ("ImagePullBackOff", "", False, None),
    ),
    "a sidecar has no image, and the trainer runs": (
        view(RUNS, others={"agent": NO_IMAGE}), ("", "", True, None),
    ),
    "a sidecar has ended, and the trainer runs": (view(RUNS, others={"agent": failed()}), ("", "", True, None)),
    "a sidecar runs on after the trainer": (view(DONE, others={"zipkin": RUNS}), ("", "", False, ":0")),
    "a sidecar failed after the trainer": (
        view(DONE, others={"agent": failed(3)}, phase="Failed"), ("", "", False, ":0"),
    ),
    "ours is the second init container": (
        view(BEGINS, init={"istio-init": DONE, "credentials": NO_IMAGE}),
        ("ImagePullBackOff", "credentials", False, None),
    ),
    "one of a mesh is the first": (
        view(BEGINS, init={"istio-init": NO_IMAGE, "credentials": BEGINS}),
        ("ImagePullBackOff", "istio-init", False, None),
    ),
    "one of a mesh runs": (
        view(BEGINS, init={"wait-for-it": RUNS, "credentials": BEGINS}),
        ("PodInitializing", "wait-for-it", False, None),
    ),
    "a native sidecar runs, and its startup probe has not passed": (
        view(BEGINS, init={"istio-proxy": RUNS, "credentials": BEGINS}, unstarted={"istio-proxy"}),
        ("PodInitializing", "istio-proxy", False, None),
    ),
    "its probe has passed": (
        view(BEGINS, init={"istio-proxy": RUNS, "credentials": RUNS}), ("PodInitializing", "credentials", False, None),
    ),
    "one of a mesh failed": (
        view(BEGINS, init={"istio-init": failed(1, message="iptables"), "credentials": BEGINS}, phase="Failed"),
        ("PodInitializing", "", False, "istio-init:1"),
    ),
    "a native sidecar crashes before the trainer": (
        view(BEGINS, init={"istio-proxy": CRASHES}), ("CrashLoopBackOff", "istio-proxy", False, None),
    ),
    "a native sidecar failed, and starts again": (
        view(BEGINS, init={"istio-proxy": failed()}), ("PodInitializing", "", False, None),
    ),
    "a native sidecar crashes beside the trainer": (view(RUNS, init={"istio-proxy": CRASHES}), ("", "", True, None)),
    "a native sidecar is killed after the trainer": (
        view(DONE, init={"credentials": DONE, "istio-proxy": failed(137)}, phase="Succeeded"), ("", "", False, ":0"),
    ),
    "the trainer failed, and so had an init container, so they say": (
        view(failed(71), init={"istio-init": failed(137, "ContainerStatusUnknown")}), ("", "", False, ":71"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_the_trainer_is_found_by_its_name(case: str) -> None:
    pod, want = STATES[case]
    assert told(pod) == want


@pytest.mark.parametrize(
    ("pod", "want"),
    [
        (view(RUNS), (False, True, False)),
        (view(DONE, others={"istio-proxy": RUNS}, phase="Running"), (True, True, True)),
        (view(DONE, others={"istio-proxy": NO_IMAGE}, phase="Pending"), (True, True, True)),
        (view(DONE, others={"istio-proxy": DONE}, phase="Running"), (True, True, False)),
        (view(DONE, phase="Succeeded"), (True, False, False)),
        (view(None, phase="Failed"), (True, False, False)),
    ],
    ids=[
        "it trains",
        "a sidecar runs on",
        "one has no image",
        "a moment before its end",
        "all has ended",
        "it was evicted",
    ],
)
def test_a_pod_holds_its_node_until_all_of_it_has_ended(pod: PodView, want: tuple[bool, bool, bool]) -> None:
    assert (pod.has_ended, pod.holds_node, pod.runs_on) == want


@pytest.mark.parametrize(
    ("ready", "containers", "want"),
    [
        ({"status": "False"}, {"status": "True"}, True),
        ({"status": "False"}, None, True),
        ({"status": "True"}, {"status": "True"}, False),
        ({"status": "False", "reason": "ContainersNotReady"}, None, False),
        ({"status": "False"}, {"status": "False"}, False),
        ({"status": "False", "reason": "ReadinessGatesNotReady"}, {"status": "True"}, False),
    ],
)
def test_a_sidecar_that_is_not_ready_is_no_fault_of_the_node(ready: Raw, containers: Raw | None, *, want: bool) -> None:
    conditions = [{"type": "Ready", **ready}, *([{"type": "ContainersReady", **containers}] if containers else [])]
    assert view(RUNS, conditions=conditions).unready is want


JOB = "tickets-1"
OWNED = [{"uid": JOB, "controller": True}]
MADE = "tickets-1-0-"

# A sentence that says the case: who owns the pod, its generateName, whose it is, whether an orphan, whether a copy.
OWNERS: dict[str, tuple[list[Raw], str | None, tuple[str, bool, bool]]] = {
    "the Job made it": (OWNED, MADE, (JOB, False, False)),
    "the Job was deleted, and it was let live": ([], MADE, (JOB, True, False)),
    "a copy, to debug it": ([], None, ("", True, False)),
    "a copy that the Job controller has taken": (OWNED, None, (JOB, False, True)),
    "one of another owner": ([{"uid": "another", "controller": True}], MADE, ("", False, False)),
    "an owner that controls nothing": ([{"uid": JOB}], None, ("", True, False)),
    "a copy with a generateName of its own": ([], "debug-", ("", True, False)),
}  # fmt: skip


@pytest.mark.parametrize("case", OWNERS)
def test_a_pod_belongs_to_the_job_that_owns_it(case: str) -> None:
    owners, generated, want = OWNERS[case]
    raw = a_raw_pod()
    raw["metadata"]["ownerReferences"] = owners
    raw["metadata"]["labels"] |= {"lorafinetune.io/uid": "run-uid", "batch.kubernetes.io/job-completion-index": "0"}
    if generated is not None:
        raw["metadata"]["generateName"] = generated
    pod = parse_pod(raw)
    assert (pod.job_uid, pod.orphaned, pod.copied) == want
    assert pod.run_uid == "run-uid"


def test_when_a_pod_got_its_node_is_known() -> None:
    condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": AT}
    assert view(None, conditions=[condition]).scheduled_at == NOW
    assert view(None, conditions=[{**condition, "status": "False"}]).scheduled_at is None


LIMITED: Raw = {"limits": {"memory": "1Gi", "cpu": "1"}}


@pytest.mark.parametrize(
    ("spec", "limited"),
    [
        ({"containers": [{"name": "trainer", "resources": LIMITED}]}, True),
        ({"containers": [{"name": "trainer", "resources": {"limits": {"cpu": "1"}}}]}, False),
        ({"containers": [{"name": "trainer", "resources": {"requests": {"memory": "1Gi"}}}]}, False),
        ({"containers": [{"name": "trainer"}, {"name": "mesh", "resources": LIMITED}]}, False),
        ({"containers": [{"name": "trainer"}], "resources": LIMITED}, True),
        ({}, True),
    ],
)
def test_whether_the_trainer_can_pass_a_memory_limit(spec: Raw, limited: bool) -> None:
    assert parse_pod(a_raw_pod(spec=spec)).memory_limited is limited


@pytest.mark.parametrize(
    ("policy", "running", "ended"),
    [(None, "setup", "setup:1"), ("Never", "setup", "setup:1"), ("OnFailure", "setup", None), ("Always", "", None)],
)
def test_an_init_container_may_have_a_restart_policy_of_its_own(
    policy: str | None, running: str, ended: str | None
) -> None:
    def with_state(state: Raw) -> PodView:
        container = {"name": "setup", **({"restartPolicy": policy} if policy else {})}
        status = {
            "initContainerStatuses": [{"name": "setup", "state": state}],
            "containerStatuses": [{"name": "trainer", "state": BEGINS}],
        }
        return parse_pod(a_raw_pod(spec={"initContainers": [container]}, status=status))

    assert told(with_state(RUNS))[1] == running
    assert told(with_state(failed()))[3] == ended
