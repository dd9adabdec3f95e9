"""Pods that have a node and do not start: it is said, and it ends."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lora_api import ConditionType, FailureClass
from lora_operator.diagnosis.firstseen import starting_seen, warned_seen
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.kube.podevents import find_warning, read_note
from lora_operator.lifecycle.decide import decide
from lora_operator.state.reports import Reports, find_refuser
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_preflight, a_run, ago, running, seen
from tests.unit.operator.cases import SETTINGS, STARTED

START, PATIENCE = SETTINGS.start_timeout, SETTINGS.preflight_timeout
SANDBOX = 'FailedCreatePodSandBox: plugin type="calico" failed'
MISSING = 'FailedMount: MountVolume.SetUp failed for volume "x": secret "x" not found'
KEY = 'FailedMount: MountVolume.SetUp failed for volume "x": references non-existent secret key: ca.crt'
CLAIM = 'FailedMount: failed to fetch PVC from API server: persistentvolumeclaims "data" not found'
ACCOUNT = 'FailedMount: failed to fetch token: serviceaccounts "trainer" not found'
CLASS = 'FailedMount: rpc error: desc = SecretProviderClass.secrets-store.csi.x-k8s.io \\"vault\\" not found'
MOUNT = "FailedMount: MountVolume.SetUp failed: rpc error: driver is not there"
DRIVER = "FailedMount: driver name ebs.csi.aws.com not found in the list of registered CSI drivers"
HOOK = 'FailedCreatePodSandBox: exec: "nvidia-container-runtime-hook": executable file not found in $PATH'
CNI = "NetworkNotReady: network is not ready: cni plugin not initialized"
DEVICES = "FailedPrepareDynamicResources: plugin gpu.nvidia.com not registered"
BLOCK = "FailedMapVolume: MapVolume.MapPodDevice failed"
CGROUP = "FailedCreatePodContainer: unable to ensure pod container exists: no space left on device"
AUDIT = "PolicyViolation: policy require-labels/check fail"
SEARCH = "DNSConfigForming: Nameserver limits were exceeded"
PULL_SECRET = "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (regcred)"
ATTACH = "FailedAttachVolume: Multi-Attach error"
PROBE = "Unhealthy: Startup probe failed: connection refused"


@dataclass(frozen=True)
class Case:
    limit: float
    reason: str
    says: str
    event: str = ""
    pod: dict[str, Any] = field(default_factory=dict)
    avoids: bool = False


CASES = {
    "no network": Case(START, "FailedCreatePodSandBox", "calico", SANDBOX, avoids=True),
    "a missing Secret, which no node has": Case(START, "FailedMount", 'secret "x" not found', MISSING),
    "a missing key of a Secret": Case(START, "FailedMount", "ca.crt", KEY),
    "a missing claim": Case(START, "FailedMount", '"data" not found', CLAIM),
    "a missing ServiceAccount": Case(START, "FailedMount", '"trainer" not found', ACCOUNT),
    "a missing class of secrets": Case(START, "FailedMount", "vault", CLASS),
    "a driver that one node does not have": Case(START, "FailedMount", "ebs.csi.aws.com", DRIVER, avoids=True),
    "a hook that one node does not have": Case(START, "FailedCreatePodSandBox", "nvidia-", HOOK, avoids=True),
    "a network that is not there yet": Case(START, "NetworkNotReady", "cni plugin", CNI, avoids=True),
    "a driver of devices": Case(START, "FailedPrepareDynamicResources", "gpu.nvidia.com", DEVICES, avoids=True),
    "a volume of blocks": Case(START, "FailedMapVolume", "MapPodDevice", BLOCK, avoids=True),
    "a cgroup": Case(START, "FailedCreatePodContainer", "no space left", CGROUP, avoids=True),
    "a policy that only looks on": Case(PATIENCE, "PodStarting", "require-labels", AUDIT),
    "too many name servers": Case(PATIENCE, "PodStarting", "Nameserver limits", SEARCH),
    "a Secret of a registry, without which it may be pulled": Case(PATIENCE, "PodStarting", "regcred", PULL_SECRET),
    "a probe of a container beside the trainer": Case(PATIENCE, "PodStarting", "Startup probe", PROBE),
    "a driver of volumes that is away": Case(START, "FailedMount", "driver is not there", MOUNT, avoids=True),
    "a volume that hangs on another node": Case(START, "FailedAttachVolume", "Multi-Attach", ATTACH),
    "an init container that goes on": Case(
        PATIENCE, "InitContainerRuns", "init container mesh", pod={"init_container": "mesh"}
    ),
    "which has got over what was warned of": Case(
        PATIENCE, "InitContainerRuns", "init container mesh", MOUNT, {"init_container": "mesh"}
    ),
    "a sidecar whose probe fails": Case(
        START, "Unhealthy", "Startup probe failed", PROBE, {"init_container": "mesh"}
    ),
    "one of which nobody says anything": Case(PATIENCE, "PodStarting", "on node n1"),
}  # fmt: skip


def stuck(case: Case, lasts: float, uid: str) -> tuple[PodView, Reports]:
    index = int(uid[-1])
    pod = a_pod(index, uid=uid, scheduled=True, node="n1", created=ago(9e5), **case.pod)
    since = {starting_seen(pod): ago(lasts), warned_seen(pod): ago(lasts)}
    return pod, Reports(pod_events={uid: case.event} if case.event else {}, seen=since)


@pytest.mark.parametrize("name", CASES)
def test_a_pod_that_has_a_node_and_does_not_start(name: str) -> None:
    case = CASES[name]
    for lasts in (case.limit - 1, case.limit):
        pod, reports = stuck(case, lasts, "pod-1-1")
        plan = decide(seen(a_run(status=STARTED), a_job(), running(0), pod, reports=reports), NOW, SETTINGS)
        mark = plan.conditions[ConditionType.RUNNING]
        assert case.says in mark.message
        assert "Remedy: " in mark.message
        if lasts < case.limit:
            assert (mark.reason, plan.requeue_after, plan.failure) == (case.reason, 1.0, None)
            continue
        assert plan.failed is not None
        failure = plan.failed.failure
        assert (failure.failure_class, failure.reason) == (FailureClass.POD_LOST, case.reason)
        assert (plan.failed.charged, plan.ended, plan.failed.backoff > 0) == (False, False, True)
        assert [node.name for node in plan.failed.avoided or ()] == (["n1"] if case.avoids else [])


@pytest.mark.parametrize("name", CASES)
def test_a_preflight_that_has_a_node_and_does_not_start(name: str) -> None:
    case = CASES[name]
    for lasts in (case.limit - 1, case.limit):
        pod, reports = stuck(case, lasts, "pod-1-0")
        pod = a_pod(0, 0, **{**case.pod, "uid": pod.uid, "scheduled": True, "node": "n1", "job_uid": "pre-1"})
        settings = replace(SETTINGS, preflight="on")
        plan = decide(seen(a_run(), a_preflight(), pod, reports=reports), NOW, settings)
        assert plan.conditions[ConditionType.PREFLIGHT_PASSED].reason == (
            case.reason if lasts < case.limit else "PodLost"
        )
        assert plan.requeue_after == (1.0 if lasts < case.limit else None)
        assert plan.ended is False


@pytest.mark.parametrize(
    ("lasts", "init_container", "want"), [(4, "mesh", "Starting"), (59, "", "Starting"), (60, "", "PodStarting")]
)
def test_what_is_brief_is_not_told_of(lasts: float, init_container: str, want: str) -> None:
    pod, reports = stuck(Case(0, "", "", pod={"init_container": init_container}), lasts, "pod-1-1")
    plan = decide(seen(a_run(status=STARTED), a_job(), running(0), pod, reports=reports), NOW, SETTINGS)
    assert plan.conditions[ConditionType.RUNNING].reason == want


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (MISSING, "Make what the message names"), (CLAIM, "Make what the message names"),
        (DRIVER, "See the driver of the volume on node n1"), (MOUNT, "See the driver of the volume on node n1"),
        (DEVICES, "See the driver of the devices on node n1"), (CNI, "See the network plugin"),
    ],
)  # fmt: skip
def test_what_a_node_lacks_has_another_remedy_than_what_the_namespace_lacks(words: str, remedy: str) -> None:
    pod, reports = stuck(Case(0, "", "", words), 10, "pod-1-1")
    plan = decide(seen(a_run(status=STARTED), a_job(), running(0), pod, reports=reports), NOW, SETTINGS)
    assert f"Remedy: {remedy}" in plan.message


def test_the_time_of_a_warning_begins_anew_where_it_has_passed() -> None:
    pod, reports = stuck(Case(0, "", "", MOUNT), 500, "pod-1-1")
    run, job = a_run(status=STARTED), a_job()
    kept = note_sightings(seen(run, job, pod, reports=reports), NOW)
    passed = note_sightings(seen(run, job, pod, reports=Reports(seen=reports.seen, pod_events={pod.uid: ""})), NOW)
    assert kept.seen[warned_seen(pod)] == ago(500)
    assert warned_seen(pod) not in passed.seen
    assert kept.seen[starting_seen(pod)] == passed.seen[starting_seen(pod)] == ago(500)


def test_who_finds_no_node_is_named_before_who_has_one() -> None:
    """Half a gang: that the others still start is no reason to say nothing of what lacks room."""
    pod, reports = stuck(Case(0, "", "", ATTACH), 10, "pod-1-0")
    other = a_pod(1, unscheduled_reason="Unschedulable", unscheduled_message="0/3 nodes are available")
    plan = decide(seen(a_run(status=STARTED), a_job(), pod, other, reports=reports), NOW, SETTINGS)
    assert plan.conditions[ConditionType.SCHEDULED].reason == "Unschedulable"
    assert "0/3 nodes" in plan.message


def event(reason: str, note: str = "x", kind: str = "Warning") -> dict[str, Any]:
    return {"type": kind, "reason": reason, "note": note}


PULLING = event("Pulling", kind="Normal")
EVENTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "none": ([], ""),
    "one": ([event("FailedMount")], "FailedMount: x"),
    "the newest": ([event("FailedMount"), event("FailedCreatePodSandBox", "y")], "FailedCreatePodSandBox: y"),
    "of the time without a node": ([event("FailedScheduling"), event("Scheduled", kind="Normal")], ""),
    "the same, written late": ([event("Scheduled", kind="Normal"), event("FailedScheduling")], ""),
    "beside another": ([event("FailedMount"), event("FailedScheduling")], "FailedMount: x"),
    "got over": ([event("FailedMount"), PULLING], ""),
    "told anew": ([PULLING, event("FailedMount", "y")], "FailedMount: y"),
    "of an image, which the pod's status tells of": ([event("FailedMount"), PULLING, event("Failed", "y")], ""),
    "again": ([event("FailedMount"), event("BackOff", "y")], ""),
    "a policy that looks on hides nothing": ([event("FailedMount"), event("PolicyViolation", "y")], "FailedMount: x"),
    "and is told of where nothing blocks": ([PULLING, event("PolicyViolation", "y")], "PolicyViolation: y"),
    "before what blocks": ([event("PolicyViolation", "y"), event("FailedMount")], "FailedMount: x"),
    "while what blocked is got over": (
        [event("FailedMount"), PULLING, event("DNSConfigForming", "y")], "DNSConfigForming: y"
    ),
    "of several": ([event("FailedMount", "(combined from similar events): y")], "FailedMount: y"),
    "no progress": ([event("FailedMount"), event("BackOff", kind="Normal")], "FailedMount: x"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
def test_the_warning_that_holds(name: str) -> None:
    events, want = EVENTS[name]
    numbered = [{**item, "metadata": {"resourceVersion": str(number)}} for number, item in enumerate(events, 9)]
    assert find_warning(reversed(numbered)) == want


def test_what_refuses_pods_stays_the_same_when_their_events_are_combined() -> None:
    """Each pod that the Job controller tries has a name of its own; after ten of them Kubernetes sums up."""
    words = 'Error creating: Pod "tickets-1-0-x7k2p" is invalid: spec.containers[0].name: Required value'
    one, several = ({"note": f"{begins}{words}"} for begins in ("", "(combined from similar events): "))
    assert read_note(one) == read_note(several) == words
    assert find_refuser(read_note(several)) == "policy"
    assert read_note({}) == ""
