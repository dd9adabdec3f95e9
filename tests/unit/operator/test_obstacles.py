"""Pods that are refused, or whose containers do not start: who mends it, what to do, how long the run waits."""

from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.firstseen import held_up_seen
from lora_operator.diagnosis.obstacles import diagnose_obstacle, find_held_up
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.lifecycle.decide import decide
from lora_operator.state.reports import Refusal, Reports, hear_refusal
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_pod,
    a_preflight,
    a_run,
    ago,
    condition,
    failure,
    running,
    seen,
    stamp,
    waiting,
)
from tests.unit.operator.cases import JOB, SETTINGS, STARTED

AWAY = (
    'Internal error occurred: failed calling webhook "pods.example.com": failed to call webhook: Post '
    '"https://hooks.example.com/": dial tcp: connection refused'
)
DENIED = 'admission webhook "pods.example.com" denied the request: no team'
CLASS = 'pods "tickets-1-0-x7k2p" is forbidden: no PriorityClass with name high was found'
FULL = 'pods "tickets-1-0-x7k2p" is forbidden: exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2'
HIERARCHICAL = (
    'Error creating: admission webhook "resourcesquotas.hnc.x-k8s.io" denied the request: exceeded hierarchical quota '
    'in namespace "team": "hrq", requested: pods=1, used: pods=8, limited: pods=8'
)
DAY = 86_400.0
REFUSED: dict[str, tuple[str, str, str, float]] = {
    "a webhook that is away": (AWAY, "WebhookFailed", "See why the webhook", DAY),
    "a webhook that says no": (DENIED, "PodNotStarted", "Correct what the message names", SETTINGS.start_timeout),
    "a priority class that is missing": (CLASS, "PriorityClassNotFound", "Create the PriorityClass", DAY),
    "a LimitRange that wants more": (
        'pods "x" is forbidden: minimum cpu usage per Container is 1, but request is 500m',
        "PodNotStarted",
        "Bring podTemplate.resources",
        SETTINGS.start_timeout,
    ),
    "Pod Security": (
        'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a policy written in CEL": (
        "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no team",
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a pod that cannot be": (
        'Error creating: Pod "x" is invalid: spec.containers[0].name: Required value',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    **{
        words: (words, "FailedCreate", "This may pass by itself", DAY)
        for words in (
            "Error creating: Internal error occurred: resource quota evaluation timed out",
            "Error creating: etcdserver: request timed out",
            'Error creating: pods "x" is forbidden: status unknown for quota: q, resources: pods',
            'Error creating: pods "x" is forbidden: error looking up service account team/default: serviceaccount '
            '"default" not found',
            "Error creating: Unauthorized",
            'pods "x" is forbidden: failed to complete mutation in 13s',
        )
    },
    "an image that a policy denies": (
        'Error creating: pods "x" is forbidden: image policy webhook backend denied one or more images: not signed',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a hierarchical quota that is full": (HIERARCHICAL, "QuotaExceeded", "Wait until the quota has room", 7 * DAY),
    "a quota that is full": (FULL, "QuotaExceeded", "Wait until the quota has room", 7 * DAY),
}

FINAL = {"FailedCreate": "See what the message names", "QuotaExceeded": "Have the quota raised"}
"""What the remedy begins with once the run has failed, where that is not what it began with before."""


@pytest.mark.parametrize("name", REFUSED)
def test_pods_that_are_refused(name: str) -> None:
    words, reason, remedy, limit = REFUSED[name]
    for since, ends in ((limit - 1, False), (limit, True)):
        reports = Reports(refusal=Refusal(words, ago(since)))
        plan = decide(seen(a_run(status=STARTED), JOB, reports=reports), NOW, SETTINGS)
        mark = plan.conditions[ConditionType.RUNNING]
        assert mark.reason == ("PodNotStarted" if ends else reason)
        assert f"Remedy: {FINAL.get(reason, remedy) if ends else remedy}" in mark.message
        assert ("by itself" in mark.message, "raise runPolicy.retry" in mark.message) == (not ends, ends)
        assert (plan.failure and plan.failure.failure_class) == (FailureClass.POD_NOT_STARTED if ends else None)
        if not ends:
            assert plan.requeue_after == 1.0


def test_the_time_goes_on_while_one_and_the_same_refuses() -> None:
    first = hear_refusal(Reports(), AWAY, ago(60))
    assert first.refusal is not None
    again = hear_refusal(first, AWAY.replace("refused", "reset"), NOW).refusal
    other = hear_refusal(first, CLASS, NOW).refusal
    assert again is not None
    assert other is not None
    assert (again.since, other.since) == (ago(60), NOW)


def test_what_refuses_the_pods_of_a_run_that_has_worked_is_waited_for_a_day() -> None:
    """The attempt ends after the usual time, and the next one asks again."""
    status = {**STARTED, "lastCheckpoint": {"step": 5, "at": stamp(ago(9000))}}
    reports = Reports(refusal=Refusal(DENIED, ago(SETTINGS.start_timeout)))
    plan = decide(seen(a_run(status=status), JOB, reports=reports), NOW, SETTINGS)
    assert plan.failed is not None
    assert plan.failed.budget is not None
    assert (plan.phase, plan.failed.charged, plan.failed.budget.since) == (Phase.RESTARTING, False, ago(600))
    assert "It is tried again by itself" in plan.message
    over = a_run(status={**status, "failingSince": stamp(ago(DAY))})
    plan = decide(seen(over, JOB, reports=reports), NOW, SETTINGS)
    assert (plan.phase, plan.reason) == (Phase.FAILED, "PodNotStarted")
    assert "raise runPolicy.retry" in plan.message


def test_a_run_that_has_worked_is_told_what_helps_against_what_it_waits_for() -> None:
    """Not only what helps against all of the class."""
    status = {**STARTED, "lastCheckpoint": {"step": 5, "at": stamp(ago(9000))}}
    words = 'pods "x" is forbidden: minimum cpu usage per Container is 1, but request is 500m'
    for lasted, again in ((600, "the run starts by itself"), (86_400, "raise runPolicy.retry")):
        reports = Reports(refusal=Refusal(words, ago(lasted)))
        plan = decide(seen(a_run(status=status), JOB, reports=reports), NOW, SETTINGS)
        assert plan.failure is not None
        assert plan.failure.remedy.startswith("Bring podTemplate.resources of the run")
        assert plan.failure.remedy.endswith(f"and {again}.")


CDI = "failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=0"
DISK = "failed to pull: write /var/lib/containerd/x: no space left on device"
SECRET = 'secret "lora-store" not found'
THROTTLED = "429 Too Many Requests: toomanyrequests"
PULL, START = FailureClass.IMAGE_PULL_FAILED, FailureClass.POD_NOT_STARTED


def held(index: int, reason: str, words: str = "") -> PodView:
    return waiting(index, reason, words, node=f"n{index}")


def lasting(pods: list[PodView], seconds: float) -> Reports:
    return Reports(seen={held_up_seen(pod, kind): ago(seconds) for kind, pod in find_held_up(pods)})


@dataclass(frozen=True)
class HeldUp:
    """Pods that are held up for 600 s: what the attempt ends with, and whether another one follows."""

    pods: list[PodView]
    failure_class: FailureClass
    again: bool
    avoids: tuple[str, ...] = ()
    says: str = ""


RUNS, PULLS = running(0, node="n0"), waiting(0, "ContainerCreating", node="n0")
HELD_UP = {
    "a node without its devices, beside one that has them": HeldUp(
        [RUNS, held(1, "CreateContainerError", CDI)], FailureClass.POD_LOST, True, ("n1",), "on node n1"
    ),
    "a node whose disk is full, beside one that has the image": HeldUp(
        [RUNS, held(1, "ErrImagePull", DISK)], FailureClass.POD_LOST, True, ("n1",), "on node n1"
    ),
    "a pull that hangs on one node": HeldUp(
        [RUNS, held(1, "ImagePullBackOff", "i/o timeout")], FailureClass.POD_LOST, True, ("n1",)
    ),
    "a registry that lets one in after the other": HeldUp(
        [RUNS, held(1, "ImagePullBackOff", THROTTLED)], FailureClass.POD_LOST, True
    ),
    "a Secret that is gone by now": HeldUp([RUNS, held(1, "CreateContainerConfigError", SECRET)], START, False),
    "a key that a Secret does not have": HeldUp(
        [RUNS, held(1, "CreateContainerConfigError", "couldn't find key token in Secret team/store")], START, False
    ),
    "nobody has started by now": HeldUp(
        [PULLS, held(1, "CreateContainerError", CDI)], START, True, ("n1",), "The next attempt avoids node n1"
    ),
    "a hook of the kubelet": HeldUp(
        [PULLS, held(1, "PreStartHookError", "no cgroup")], START, True, ("n1",), "PreStartHookError: no cgroup"
    ),
    "a word that nobody knows": HeldUp([PULLS, held(1, "NewError", "it is new")], START, True, ("n1",), "it is new"),
    "a disk that is full, and nobody has the image": HeldUp(
        [PULLS, held(1, "ErrImagePull", DISK)], PULL, True, ("n1",), "The next attempt avoids node n1"
    ),
    "two nodes that say the same": HeldUp(
        [held(0, "CreateContainerError", CDI), held(1, "CreateContainerError", CDI)], START, False
    ),
    "an image that nobody has": HeldUp([PULLS, held(1, "ErrImagePull", "not found")], PULL, False),
    "a name that is none": HeldUp([held(0, "InvalidImageName"), held(1, "InvalidImageName")], PULL, False),
    "a Secret that nobody has": HeldUp([PULLS, held(1, "CreateContainerConfigError", SECRET)], START, False),
}


@pytest.mark.parametrize("name", HELD_UP)
def test_what_holds_up_one_node_ends_no_run(name: str) -> None:
    case = HELD_UP[name]
    early = decide(seen(a_run(status=STARTED), JOB, *case.pods, reports=lasting(case.pods, 599)), NOW, SETTINGS)
    assert (early.phase, early.requeue_after, early.failure) == (Phase.STARTING, 1.0, None)
    plan = decide(seen(a_run(status=STARTED), JOB, *case.pods, reports=lasting(case.pods, 600)), NOW, SETTINGS)
    assert plan.failed is not None
    assert (plan.phase is Phase.RESTARTING, plan.failed.failure.failure_class) == (case.again, case.failure_class)
    assert not plan.failed.charged
    assert tuple(node.name for node in plan.failed.avoided or ()) == case.avoids
    assert plan.failed.failure.node == (case.avoids[0] if case.avoids else None)
    assert case.says in plan.message
    for node in case.avoids:
        assert f"node {node}" in early.message.partition("Remedy: ")[2]
    assert early.conditions[ConditionType.RUNNING].reason == plan.failed.failure.reason


def test_one_more_node_that_says_the_same_ends_a_run() -> None:
    before = {**failure(1, "PodNotStarted"), "node": "n7", "reason": "PodNotStarted"}
    status = {"attempt": 2, "recentFailures": 1, "failures": [before]}
    pod = waiting(1, "CreateContainerError", CDI, node="n1", attempt=2, job_uid="job-2")
    plan = decide(seen(a_run(status=status), a_job(2), pod, reports=lasting([pod], 600)), NOW, SETTINGS)
    assert (plan.phase, plan.reason) == (Phase.FAILED, "PodNotStarted")
    assert "(node n7 said so too)" in plan.message


def test_a_node_that_failed_has_said_nothing_of_a_policy() -> None:
    before = {**failure(1, "PodNotStarted"), "node": "n7", "reason": "StartError"}
    status = {"attempt": 2, "recentFailures": 1, "failures": [before]}
    plan = decide(
        seen(a_run(status=status), a_job(2), reports=Reports(refusal=Refusal(DENIED, ago(600)))), NOW, SETTINGS
    )
    assert plan.phase is Phase.FAILED
    assert "said so too" not in plan.message


@pytest.mark.parametrize(("reason", "words"), [("CreateContainerError", CDI), ("ErrImagePull", DISK)])
def test_a_run_that_has_worked_avoids_the_node_that_holds_it_up(reason: str, words: str) -> None:
    """A run of a single node, too."""
    status = {**STARTED, "conditions": [condition("PreflightPassed")]}
    run = a_run(status=status, parallelism={"nodes": 1, "gpusPerNode": 0})
    pod = waiting(0, reason, words, node="n1")
    plan = decide(seen(run, a_job(size=1), pod, reports=lasting([pod], 600)), NOW, SETTINGS)
    assert plan.phase is Phase.RESTARTING
    assert plan.failed is not None
    assert [node.name for node in plan.failed.avoided or ()] == ["n1"]
    remedy = plan.failed.failure.remedy
    assert "If another node says the same: See the disk, the devices and the container runtime of node n1." in remedy
    assert "by itself" in remedy
    assert "runPolicy.retry" not in remedy


def test_a_preflight_that_a_node_cannot_start_is_tried_on_another_one() -> None:
    pod = a_pod(0, 0, job_uid="pre-1", scheduled=True, node="n1", waiting_reason="RunContainerError")
    settings = replace(SETTINGS, preflight="on")
    plan = decide(seen(a_run(), a_preflight(), pod, reports=lasting([pod], 600)), NOW, settings)
    assert plan.phase is Phase.PREFLIGHT
    assert plan.failed is not None
    assert [node.name for node in plan.failed.avoided or ()] == ["n1"]


def test_a_registry_that_lets_in_one_after_the_other_ends_nothing() -> None:
    """Four pods pull in turn, each of them held up for 200 s: the time of one is not that of another."""
    run, job, reports = a_run(status=STARTED, parallelism={"nodes": 4, "gpusPerNode": 0}), a_job(size=4), Reports()
    for turn in range(8):
        now, index = NOW + timedelta(seconds=200 * turn), turn // 2
        before = [waiting(one, "ContainerCreating", node=f"n{one}") for one in range(index)]
        after = [waiting(one, "ContainerCreating", node=f"n{one}") for one in range(index + 1, 4)]
        observed = seen(run, job, *before, held(index, "ErrImagePull", THROTTLED), *after, reports=reports)
        reports = note_sightings(observed, now)
        plan = decide(replace(observed, reports=reports), now, SETTINGS)
        assert (plan.failure, plan.reason) == (None, "ImagePullFailed")
        assert plan.requeue_after == (600.0, 400.0)[turn % 2]


def test_who_is_held_up_for_longest_comes_first() -> None:
    first, second = held(0, "ErrImagePull", THROTTLED), held(1, "CreateContainerError", CDI)
    reports = Reports(seen={held_up_seen(first, PULL): ago(10), held_up_seen(second, START): ago(590)})
    plan = decide(seen(a_run(status=STARTED), JOB, first, second, reports=reports), NOW, SETTINGS)
    assert (plan.reason, plan.requeue_after) == ("PodNotStarted", 10.0)


@pytest.mark.parametrize(
    ("pods", "refused", "want"),
    [
        ([a_pod(0), a_pod(1)], None, None),
        ([running(0), running(1)], "exceeded quota", "QuotaExceeded"),
        ([waiting(0, "ContainerCreating")], None, None),
        ([waiting(0, "ImagePullBackOff")], None, "ImagePullFailed"),
        ([waiting(0, "InvalidImageName")], None, "ImagePullFailed"),
        ([waiting(0, "CreateContainerConfigError")], None, "PodNotStarted"),
        ([waiting(0, "CreateContainerConfigError"), waiting(1, "ErrImagePull")], None, "ImagePullFailed"),
        ([a_pod(0, unscheduled_reason="Unschedulable")], None, "Unschedulable"),
        ([a_pod(0, unscheduled_reason="SchedulingGated")], None, "SchedulingGated"),
        ([a_pod(0, unscheduled_reason="Unschedulable"), waiting(1, "ErrImagePull")], None, "ImagePullFailed"),
        ([], "pods is forbidden: violates PodSecurity", "PodNotStarted"),
    ],
)
def test_diagnose_obstacle(pods: list[PodView], refused: str | None, want: str | None) -> None:
    obstacle = diagnose_obstacle(pods, a_job(), Reports(refusal=Refusal(refused, NOW) if refused else None), NOW)
    assert (obstacle.reason if obstacle else None) == want
    if obstacle is not None:
        assert obstacle.remedy
        assert obstacle.text.endswith(f". Remedy: {obstacle.remedy}")


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ('0/1 nodes are available: persistentvolumeclaim "data" not found.', "Create the claim"),
        ("0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.", "Create the claim"),
        ("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.", "Free or add nodes"),
    ],
)
def test_a_claim_that_is_in_the_way_has_a_remedy_of_its_own(message: str, remedy: str) -> None:
    pod = a_pod(0, unscheduled_reason="Unschedulable", unscheduled_message=message)
    obstacle = diagnose_obstacle([pod], a_job(), Reports(), NOW)
    assert obstacle is not None
    assert message in obstacle.message
    assert obstacle.remedy.startswith(remedy)
