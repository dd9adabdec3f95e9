"""From pods to the one failure that explains all of them."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_api import RULES, FailureClass
from lora_operator.diagnosis.diagnose import diagnose_pod, diagnose_pods, diagnose_root
from lora_operator.diagnosis.firstseen import end_seen, job_seen
from lora_operator.state.observed import stop_seen
from lora_operator.watched.views import PodView
from lora_operator.wording import with_remedy
from tests.unit.operator.builders import NOW, a_job, a_pod, ago, ended, running, said

GRACE = 20.0


def init_ended(code: int, message: str = "", **changes: Any) -> PodView:
    """A pod whose first init container, of a mesh, has failed."""
    pod = ended(1, code, message, **changes)
    assert pod.ended is not None
    return replace(pod, ended=replace(pod.ended, init_container="istio-init"))


DISRUPTED: dict[str, Any] = {"disruption": "PreemptionByScheduler", "disruption_message": "preempting"}


@dataclass(frozen=True)
class Case:
    name: str
    pod: PodView
    want: FailureClass | None
    reason: str = ""
    message: str = ""


CASES = [
    Case("a pod that waits is well", a_pod(), None),
    Case("a pod that runs is well", running(), None),
    Case("a peer that is done is well", ended(1, 0), None),
    Case("rank 0 that is done without a word is not", ended(0, 0), FailureClass.INTERNAL, "NoTerminationMessage"),
    Case("the trainer's word counts", ended(1, 70, said("BadData", "record 7")), FailureClass.BAD_DATA, "", "record 7"),
    Case(
        "the kernel's word counts more than the launcher's guess",
        ended(1, 1, said("Internal", "worker died by signal 9"), reason="OOMKilled"),
        FailureClass.HOST_OUT_OF_MEMORY,
        "OOMKilled",
    ),
    Case("out of memory as PID 1", ended(1, 137, reason="OOMKilled"), FailureClass.HOST_OUT_OF_MEMORY),
    Case(
        "out of memory without a limit: the node was full",
        ended(1, 137, reason="OOMKilled", memory_limited=False, node="n1"),
        FailureClass.EVICTED,
        "NodeOutOfMemory",
        "node n1 had no memory left, and the pod has no memory limit",
    ),
    Case("killed from outside", ended(1, 137), FailureClass.POD_LOST, "Killed"),
    Case("ended by SIGTERM without a word", ended(1, 143), FailureClass.POD_LOST, "Killed"),
    Case(
        "the kubelet lost the container",
        ended(1, 137, "The container could not be located", reason="ContainerStatusUnknown", at=None),
        FailureClass.POD_LOST,
        "ContainerStatusUnknown",
        "its node restarted, or no longer knows its containers: The container could not be located",
    ),
    Case("the node restarted", ended(1, 255, reason="Unknown"), FailureClass.POD_LOST, "Unknown"),
    Case(
        "the node restarted as the pod was evicted",
        ended(1, 255, reason="Unknown", **DISRUPTED),
        FailureClass.EVICTED,
        "PreemptionByScheduler",
    ),
    Case("a program that ends with 255", ended(1, 255), FailureClass.INTERNAL, "", "exit code 255"),
    Case(
        "an init container of a mesh failed",
        init_ended(1, "iptables: no such table"),
        FailureClass.POD_LOST,
        "InitContainerFailed",
        "Init container istio-init of pod tickets-1-1 ended with exit code 1 (Error): iptables: no such table",
    ),
    Case(
        "its exit code is none of the trainer's",
        init_ended(67),
        FailureClass.POD_LOST,
        "InitContainerFailed",
        "Init container istio-init of pod tickets-1-1 ended with exit code 67 (Error)",
    ),
    Case(
        "its memory is none of the run's",
        init_ended(137, reason="OOMKilled"),
        FailureClass.POD_LOST,
        "InitContainerFailed",
        "istio-init of pod tickets-1-1 ended with exit code 137 (OOMKilled)",
    ),
    Case(
        "and it may be lost", init_ended(137, reason="ContainerStatusUnknown"), FailureClass.POD_LOST, "StatusUnknown"
    ),
    Case("or evicted", init_ended(137, **DISRUPTED), FailureClass.EVICTED),
    Case(
        "an init container that cannot be started",
        init_ended(128, "exec format error", reason="StartError"),
        FailureClass.POD_NOT_STARTED,
        "StartError",
        "Init container istio-init of pod tickets-1-1 did not start: exec format error",
    ),
    Case("an exit code of the table without a word", ended(1, 74), FailureClass.STORE_UNAVAILABLE),
    Case("another exit code without a word", ended(1, 3), FailureClass.INTERNAL, "", "exit code 3"),
    Case("words of another program", ended(1, 65, "Traceback"), FailureClass.BAD_DATA),
    Case("a container that does not start", ended(1, 128, reason="StartError"), FailureClass.POD_NOT_STARTED),
    Case(
        "a checkpoint because of a preemption is an eviction",
        ended(1, 75, said("Checkpointed"), **DISRUPTED),
        FailureClass.EVICTED,
        "PreemptionByScheduler",
        "preempting",
    ),
    Case("killed after a preemption", ended(1, 137, **DISRUPTED), FailureClass.EVICTED),
    Case("a fault of its own during a preemption", ended(1, 65, said("BadData"), **DISRUPTED), FailureClass.BAD_DATA),
    *(
        Case(
            f"{name} of a pod that is taken away may come from that",
            ended(1, 70, said(name, "it broke"), **DISRUPTED),
            FailureClass.EVICTED,
            "PreemptionByScheduler",
            f"preempting. It said: {name}: it broke",
        )
        for name in (
            "Internal",
            "GPUKernelFailed",
            "GPUUnavailable",
            "DiskFull",
            "Diverged",
            "StoreUnavailable",
            "AuthDenied",
            "HostOutOfMemory",
            "Stalled",
            "ClassOfALaterVersion",
        )
    ),
    *(
        Case(f"{name} does not", ended(1, 70, said(name, "it broke"), **DISRUPTED), FailureClass(name), "", "it broke")
        for name in (
            "BadSpec",
            "ModelNotFound",
            "SourceChanged",
            "GateRefused",
            "GPUOutOfMemory",
            "WeightsChanged",
            "GPUFault",
            "GPUUnsupported",
            "LimitTooLow",
        )
    ),
    Case("out of memory while it was taken away", ended(1, 137, reason="OOMKilled", **DISRUPTED), FailureClass.EVICTED),
    Case(
        "the kubelet's own word of an eviction counts too",
        replace(
            ended(1, 70, said("Internal", "it broke")),
            reason="Evicted",
            message="The node was low on memory",
        ),
        FailureClass.EVICTED,
        "Evicted",
        "low on memory. It said: Internal: it broke",
    ),
    Case("a checkpoint because of a deletion", ended(1, 75, said("Checkpointed")), FailureClass.CHECKPOINTED),
    Case("evicted", a_pod(1, phase="Failed", reason="Evicted", message="low on memory"), FailureClass.EVICTED),
    Case(
        "evicted because its own disk is full",
        a_pod(1, phase="Failed", reason="Evicted", message="Usage of EmptyDir volume work exceeds the limit"),
        FailureClass.DISK_FULL,
        "DiskLimitExceeded",
    ),
    Case(
        "or its container's",
        a_pod(
            1,
            phase="Failed",
            reason="Evicted",
            message='Container trainer exceeded its local ephemeral storage limit "2Gi". ',
        ),
        FailureClass.DISK_FULL,
        "DiskLimitExceeded",
    ),
    Case(
        "a disk that others have filled too is the node's",
        a_pod(
            1,
            phase="Failed",
            reason="Evicted",
            message="The node was low on resource: ephemeral-storage. "
            "Container trainer was using 3Gi, request is 0, has larger consumption of ephemeral-storage. ",
        ),
        FailureClass.EVICTED,
    ),
    Case(
        "the taint manager means a lost node",
        a_pod(1, phase="Failed", disruption="DeletionByTaintManager"),
        FailureClass.NODE_LOST,
    ),
    Case("the pod's node object is gone", running(1, gone=True, disruption="DeletionByPodGC"), FailureClass.NODE_LOST),
    Case("gone without a word", running(1, gone=True), FailureClass.POD_LOST, "Deleted", "was deleted"),
    Case("refused by the node", a_pod(1, phase="Failed", reason="OutOfcpu"), FailureClass.POD_LOST, "OutOfcpu"),
    Case("asked to stop, still within its time", running(1, deleting_at=ago(-60)), None),
    Case("asked to stop, just over its time", running(1, deleting_at=ago(19)), None),
    Case("asked to stop, long over its time", running(1, deleting_at=ago(21)), FailureClass.NODE_LOST),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_diagnose_pod(case: Case) -> None:
    seen = {stop_seen(case.pod): case.pod.deleting_at} if case.pod.deleting_at else {}
    symptom = diagnose_pod(case.pod, NOW, grace=GRACE, seen=seen)
    assert (symptom.failure_class if symptom else None) == case.want
    assert case.reason in (symptom.reason if symptom else "")
    assert case.message in (symptom.message if symptom else "")


@dataclass(frozen=True)
class Root:
    name: str
    pods: list[PodView]
    want: FailureClass
    pod: int


ROOTS = [
    Root(
        "an echo is never the root, even if it came first",
        [ended(0, 73, said("PeerLost", at=ago(9))), ended(1, 65, said("BadData", at=ago(1)))],
        FailureClass.BAD_DATA,
        1,
    ),
    Root(
        "a kernel that broke off is no root beside a GPU that died",
        [ended(0, 83, said("GPUKernelFailed", at=ago(9))), ended(1, 80, said("GPUFault", at=ago(1)))],
        FailureClass.GPU_FAULT,
        1,
    ),
    Root(
        "the earliest of two faults",
        [ended(0, 74, said("StoreUnavailable", at=ago(5))), ended(1, 65, said("BadData", at=ago(6)))],
        FailureClass.BAD_DATA,
        1,
    ),
    Root(
        "memory explains the peers' broken connections",
        [ended(0, 73, said("PeerLost", at=ago(1))), ended(1, 137, reason="OOMKilled", at=ago(3))],
        FailureClass.HOST_OUT_OF_MEMORY,
        1,
    ),
    Root(
        "an eviction explains its peers' checkpoints",
        [ended(0, 75, said("Checkpointed", at=ago(2))), ended(1, 75, said("Checkpointed", at=ago(1)), **DISRUPTED)],
        FailureClass.EVICTED,
        1,
    ),
    Root(
        "an eviction explains a checkpoint that was not complete in time",
        [ended(0, 73, said("PeerLost", at=ago(2))), ended(1, 70, said("PodLost", at=ago(1)), **DISRUPTED)],
        FailureClass.EVICTED,
        1,
    ),
    Root(
        "the pod that was deleted is why all saved a checkpoint",
        [
            ended(0, 75, said("Checkpointed", at=ago(2))),
            ended(1, 75, said("Checkpointed", at=ago(1)), deleting_at=ago(-60)),
        ],
        FailureClass.CHECKPOINTED,
        1,
    ),
    Root(
        "when all lost a peer, the silent one is the suspect",
        [ended(0, 73, said("PeerLost")), running(1), ended(2, 73, said("PeerLost"))],
        FailureClass.PEER_LOST,
        1,
    ),
    Root(
        "a node that does not answer explains it",
        [ended(0, 73, said("PeerLost")), running(1), running(2, unready=True)],
        FailureClass.NODE_LOST,
        2,
    ),
    Root(
        "a pod that was asked to stop is what its peers have lost",
        [ended(0, 73, said("PeerLost")), running(1, unready=True, deleting_at=ago(-60))],
        FailureClass.POD_LOST,
        1,
    ),
    Root(
        "when all lost each other, the first to say so",
        [ended(0, 73, said("PeerLost", at=ago(1))), ended(1, 73, said("PeerLost", at=ago(2)))],
        FailureClass.PEER_LOST,
        1,
    ),
]


JOB = a_job()
PODS = [ended(0, 74, said("StoreUnavailable", at=ago(5))), ended(1, 65, said("BadData", at=ago(6)))]

# A sentence that says the case: by how many seconds the clock of pod 1's node is ahead, and how long ago this operator
# saw the ends of pods 0 and 1 and the Job first. Pod 1 ended a second before pod 0.
CLOCKS: dict[str, tuple[float, tuple[float, float, float], int]] = {
    "both clocks are right": (0, (4, 4, 90), 1),
    "they are a minute late, and nobody can know": (-60, (4, 4, 90), 1),
    "one is two hours ahead, and was seen first": (7200, (3, 4, 90), 1),
    "one is two hours ahead, and was seen last": (7200, (4, 3, 90), 0),
    "one is two hours behind, and was seen last": (-7200, (4, 3, 90), 0),
    "all was over when this operator began": (0, (1, 1, 1), 1),
    "and one is behind the making of the Job": (-7200, (1, 1, 1), 0),
}


@pytest.mark.parametrize("case", CLOCKS)
def test_the_clock_of_a_node_is_believed_where_it_can_be_right(case: str) -> None:
    ahead, (first, second, began), want = CLOCKS[case]
    pods = [PODS[0], ended(1, 65, said("BadData", at=ago(6 - ahead)))]
    seen = {end_seen(pods[0]): ago(first), end_seen(pods[1]): ago(second), job_seen(JOB): ago(began)}
    symptoms = diagnose_pods(pods, JOB, NOW, grace=GRACE, processes_per_node=1, seen=seen)
    found = diagnose_root(symptoms, pods, 1, NOW, seen)
    assert found.pod == f"tickets-1-{want}"
    assert found.at == ago((first, second)[want]), "when it was seen, by our clock"


@pytest.mark.parametrize("case", ROOTS, ids=lambda case: case.name)
def test_diagnose_root(case: Root) -> None:
    symptoms = diagnose_pods(case.pods, a_job(), NOW, grace=GRACE, processes_per_node=1)
    failure = diagnose_root(symptoms, case.pods, 1, NOW)
    assert (failure.failure_class, failure.pod) == (case.want, f"tickets-1-{case.pod}")
    assert failure.remedy == RULES[case.want].remedy


def test_the_trainers_own_remedy_rank_and_exit_code_are_kept() -> None:
    pods = [ended(1, 71, said("GPUOutOfMemory", "11 GiB short", rank=13, remedy="Set microBatchSize to 2."))]
    symptoms = diagnose_pods(pods, a_job(), NOW, grace=GRACE, processes_per_node=8)
    failure = diagnose_root(symptoms, pods, 3, NOW)
    assert (failure.remedy, failure.rank, failure.exit_code) == ("Set microBatchSize to 2.", 13, 71)
    assert (failure.attempt, failure.message) == (3, "11 GiB short")


@pytest.mark.parametrize(("processes", "rank"), [(1, 1), (8, None)])
def test_a_pod_without_words_is_a_rank_where_it_has_one_process(processes: int, rank: int | None) -> None:
    symptoms = diagnose_pods([ended(1, 137)], a_job(), NOW, grace=GRACE, processes_per_node=processes)
    assert symptoms[0].rank == rank


def test_a_job_that_was_ended_from_outside_is_a_symptom() -> None:
    job = a_job(failure="DeadlineExceeded: Job was active longer than specified deadline")
    symptoms = diagnose_pods([running()], job, NOW, grace=GRACE, processes_per_node=1)
    assert [(item.failure_class, item.reason) for item in symptoms] == [(FailureClass.POD_LOST, "JobFailed")]


@pytest.mark.parametrize(
    ("message", "remedy", "want"),
    [("It broke.", "Mend it.", "It broke. Remedy: Mend it."), (" it broke ", "", "it broke.")],
)
def test_with_remedy(message: str, remedy: str, want: str) -> None:
    assert with_remedy(message, remedy) == want
