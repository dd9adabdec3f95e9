"""Why an attempt failed: from what Kubernetes and the pods say to one Failure. All pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from lora_api import CLASS_BY_EXIT_CODE, MAY_FOLLOW, RULES, Failure, FailureClass, Termination, parse_termination
from lora_operator.diagnosis.findings import Symptom
from lora_operator.diagnosis.firstseen import can_be, ended_at, was_asked_first
from lora_operator.diagnosis.reasons import DISK_LIMIT, NODE_FULL, NOT_STARTED, is_lost, passed_disk_limit, was_refused
from lora_operator.state.observed import ends_by
from lora_operator.watched.views import Ended, JobView, PodView

ECHOES = frozenset({FailureClass.PEER_LOST, FailureClass.CHECKPOINTED})
"""What the innocent pods of a gang say after another one failed or was asked to stop."""

INIT_CONTAINER_FAILED = "InitContainerFailed"
"""Reason of a failure of a container that is to end, or to run, before the trainer starts."""

PEER_SILENT = "PeerSilent"
"""Reason of a failure that is blamed on a pod for saying nothing."""

_NODE_FULL_REMEDY = (
    "See what else runs on the node. Where it is the run that needs so much, set requests and limits of memory in "
    "podTemplate.resources, so that its pods go where there is enough: that takes a new run, which goes on from the "
    "last checkpoint with checkpoint.resumeFrom. Else make room, then raise runPolicy.retry if the run has ended."
)

_NEVER_BY_ENDING = frozenset(
    {FailureClass.BAD_SPEC, FailureClass.BAD_DATA, FailureClass.MODEL_NOT_FOUND, FailureClass.SOURCE_CHANGED,
     FailureClass.GATE_REFUSED, FailureClass.GPU_OUT_OF_MEMORY, FailureClass.WEIGHTS_CHANGED, FailureClass.GPU_FAULT,
     FailureClass.GPU_UNSUPPORTED, FailureClass.LIMIT_TOO_LOW}
)  # fmt: skip
"""What a pod that is being taken away does not fail with for that: it has the same cause in the next attempt, too.

A trainer that is ended loses its peers, its network, its device plugin and its half-done collectives, so that any other
class may come from that. A failure of the run itself comes again, and is told of then.
"""

_NODE_LOST = frozenset({"DeletionByTaintManager", "DeletionByPodGC", "NodeLost"})
_EVICTED = frozenset(
    {"PreemptionByScheduler", "EvictionByEvictionAPI", "TerminationByKubelet", "Evicted", "Preempting", "Shutdown",
     "NodeShutdown", "Terminated"}
)  # fmt: skip
_KILLED = 128 + 9
_TERMINATED = 128 + 15


def termination_of(pod: PodView) -> Termination | None:
    """The trainer's last words in ``pod``."""
    return parse_termination(pod.ended.message) if pod.ended else None


def diagnose_pods(
    pods: Sequence[PodView],
    job: JobView,
    now: datetime,
    *,
    grace: float,
    processes_per_node: int,
    seen: Mapping[str, datetime] = {},
) -> list[Symptom]:
    """What is wrong with the pods of ``job``, in the order of their indexes. Pods that run or succeeded are well.

    ``seen``: when what was seen first (``sightings``).
    """
    symptoms = [symptom for pod in pods if (symptom := diagnose_pod(pod, now, grace=grace, seen=seen))]
    indexes = {pod.index for pod in pods}
    symptoms += [
        Symptom(FailureClass.POD_LOST, "PodGone", f"Pod {index} of Job {job.name} failed and is gone", at=job.created)
        for index in sorted(job.failed_indexes - indexes)
    ]
    if 0 in job.completed_indexes - indexes:
        message = f"Pod 0 of Job {job.name} succeeded and is gone, and with it the word of what came of it"
        symptoms.append(Symptom(FailureClass.POD_LOST, "PodGone", message, at=job.created))
    if job.failure and not symptoms:
        symptoms.append(Symptom(FailureClass.POD_LOST, "JobFailed", f"Job {job.name} was ended: {job.failure}"))
    if processes_per_node == 1:
        symptoms = [
            replace(symptom, rank=symptom.pod.index) if symptom.rank is None and symptom.pod else symptom
            for symptom in symptoms
        ]
    if all(can_be(symptom.at, symptom.pod, job, seen) for symptom in symptoms):
        return symptoms
    # The clock of one of the nodes is wrong: what ended first is what was seen first.
    return [replace(one, at=ended_at(one.pod, seen, now)) if one.pod else one for one in symptoms]


def diagnose_pod(pod: PodView, now: datetime, *, grace: float, seen: Mapping[str, datetime] = {}) -> Symptom | None:
    """What is wrong with ``pod``, or ``None``.

    A pod that was asked to stop is well until it ends, because it may be saving a checkpoint; it is lost when it is
    still there ``grace`` seconds after the kubelet had to have ended it.
    """
    ended = pod.ended
    if ended is not None and ended.init_container:
        return _diagnose_init_container(pod, ended)
    if ended is not None and ended.exit_code == 0:
        return _diagnose_silent_success(pod)
    if ended is not None:
        return _diagnose_exit(pod, ended.exit_code, seen)
    if pod.phase == "Failed" or pod.gone:
        return _diagnose_without_exit(pod)
    due = ends_by(pod, seen, now)
    if pod.deleting_at is not None and due is not None and (now - due).total_seconds() > grace:
        message = f"Node of pod {pod.name} does not answer: the pod was to be gone at {pod.deleting_at:%H:%M:%S} UTC"
        return Symptom(FailureClass.NODE_LOST, "NodeLost", message, pod, at=pod.deleting_at)
    return None


def seconds_to_lost(pods: Iterable[PodView], now: datetime, grace: float, seen: Mapping[str, datetime]) -> float | None:
    """Seconds until the first of the ``pods`` that are asked to stop counts as lost; ``None`` where none is."""
    due = [at for pod in pods if not pod.has_ended and (at := ends_by(pod, seen, now))]
    return max(1.0, (min(due) - now).total_seconds() + grace + 1) if due else None


def _diagnose_silent_success(pod: PodView) -> Symptom | None:
    """Rank 0 has to say what it published, and a preflight what it settled; other pods have nothing to say."""
    termination = termination_of(pod)
    said = termination is not None and (termination.adapter or termination.preflight)
    if pod.index != 0 or (termination is not None and termination.outcome == "succeeded" and said):
        return None
    message = f"Pod {pod.name} ended with success but did not say what came of it"
    return Symptom(FailureClass.INTERNAL, "NoTerminationMessage", message, pod, at=pod.ended.at if pod.ended else None)


def _diagnose_exit(pod: PodView, exit_code: int, seen: Mapping[str, datetime]) -> Symptom:
    ended, termination = pod.ended, termination_of(pod)
    if ended is None:
        raise ValueError(f"pod {pod.name} has not ended")
    at, said = ended.at, termination.failure_class if termination else None
    taken = None if said in _NEVER_BY_ENDING else _diagnose_disruption(pod)
    if taken is None and said not in _NEVER_BY_ENDING | ECHOES | {None} and was_asked_first(pod, pod, seen):
        taken = _diagnose_deletion(pod)
    if taken is not None:
        return replace(taken, at=at, message=_add_said(taken.message, termination), step=_step(termination))
    if ended.reason == "OOMKilled" and not pod.memory_limited:
        return _diagnose_full_node(pod, ended, termination)
    if ended.reason == "OOMKilled":
        message = f"Pod {pod.name} passed its memory limit and was ended by the kernel"
        size = termination.micro_batch_size if termination else None
        return Symptom(FailureClass.HOST_OUT_OF_MEMORY, "OOMKilled", message, pod, micro_batch_size=size, at=at)
    if termination is not None and said is not None:
        message = termination.message or RULES[said].meaning
        remedy = termination.remedy or ""
        if not said.known:  # of a newer trainer: what is known of it is that the trainer failed
            said, message = FailureClass.INTERNAL, f"{said}: {message}"
        if RULES[said].node and pod.node:
            message = f"Node {pod.node}, {message}"
        return Symptom(
            said, ended.reason or str(said), message, pod, remedy, termination.rank, termination.step,
            termination.micro_batch_size, termination.at,
        )  # fmt: skip
    if is_lost(ended):
        return _diagnose_lost(pod, ended)
    if ended.reason in NOT_STARTED:
        message = f"The container of pod {pod.name} did not start{_on(pod)}: {ended.message or ended.reason}"
        return Symptom(FailureClass.POD_NOT_STARTED, ended.reason, message, pod, at=at)
    if exit_code in (_KILLED, _TERMINATED):
        return Symptom(FailureClass.POD_LOST, "Killed", f"Pod {pod.name} was killed from outside", pod, at=at)
    known = CLASS_BY_EXIT_CODE.get(exit_code)
    if known is not None:
        return Symptom(known, ended.reason, f"Pod {pod.name}: {RULES[known].meaning}", pod, at=at)
    message = f"Pod {pod.name} ended with exit code {exit_code} and no word why"
    return Symptom(FailureClass.INTERNAL, ended.reason or "Error", message, pod, at=at)


def _add_said(message: str, termination: Termination | None) -> str:
    """``message`` of a pod that was taken away, with what it said itself, where that is no echo."""
    said = termination.failure_class if termination else None
    if termination is None or said is None or said in ECHOES or said == FailureClass.POD_LOST:
        return message
    return f"{message.rstrip('.')}. It said: {said}: {termination.message or RULES[said].meaning}"


def _step(termination: Termination | None) -> int | None:
    return termination.step if termination else None


def _diagnose_full_node(pod: PodView, ended: Ended, termination: Termination | None) -> Symptom:
    """A pod that has no limit which it could have passed: the kernel ended it because its node was full."""
    node = f"node {pod.node}" if pod.node else "its node"
    message = f"Pod {pod.name} was ended by the kernel: {node} had no memory left, and the pod has no memory limit"
    step = _step(termination)
    return Symptom(FailureClass.EVICTED, NODE_FULL, message, pod, _NODE_FULL_REMEDY, step=step, at=ended.at)


def _diagnose_lost(pod: PodView, ended: Ended) -> Symptom:
    words = f": {ended.message}" if ended.message else ""
    message = f"Pod {pod.name} was lost: its node restarted, or no longer knows its containers{words}"
    return Symptom(FailureClass.POD_LOST, ended.reason, message, pod, at=ended.at)


def _diagnose_init_container(pod: PodView, ended: Ended) -> Symptom:
    """A container failed that was to end before the trainer starts.

    What it does is not ours to know, as anybody may have put it there: its exit code is none of the trainer's, and the
    next try may succeed.
    """
    taken = _diagnose_disruption(pod)
    if taken is not None:
        return replace(taken, at=ended.at)
    if is_lost(ended):
        return _diagnose_lost(pod, ended)
    what, words = f"Init container {ended.init_container} of pod {pod.name}", ended.message.strip()
    if ended.reason in NOT_STARTED:
        message = f"{what} did not start{_on(pod)}: {words or ended.reason}"
        return Symptom(FailureClass.POD_NOT_STARTED, ended.reason, message, pod, at=ended.at)
    how = f"{what} ended with exit code {ended.exit_code} ({ended.reason or 'Error'})"
    remedy = describe_init_remedy(pod.name, ended.init_container)
    message = f"{how}: {words}" if words else how
    return Symptom(FailureClass.POD_LOST, INIT_CONTAINER_FAILED, message, pod, remedy, at=ended.at)


def _on(pod: PodView) -> str:
    return f" on node {pod.node}" if pod.node else ""


def describe_init_remedy(pod: str, container: str) -> str:
    """What to do about an init container that fails."""
    return (
        f"See its log (kubectl logs {pod} -c {container}): whoever puts it into the pods, a mesh or an agent for "
        "example, has to mend it. The next attempt starts by itself."
    )


def _diagnose_without_exit(pod: PodView) -> Symptom:
    """A pod that is gone or failed without an exit code of its container."""
    taken = _diagnose_disruption(pod)
    if taken is not None:
        return taken
    if was_refused(pod):
        message = f"Node refused pod {pod.name}: {pod.message or pod.reason}"
        return Symptom(FailureClass.POD_LOST, pod.reason, message, pod, at=pod.deleting_at)
    message = f"Pod {pod.name} was deleted" if pod.gone or pod.deleting_at else f"Pod {pod.name} failed: {pod.message}"
    return Symptom(FailureClass.POD_LOST, pod.reason or "Deleted", message, pod, at=pod.deleting_at)


def _diagnose_disruption(pod: PodView) -> Symptom | None:
    """Kubernetes itself took the pod away."""
    detail = pod.disruption_message or pod.message
    reason = pod.disruption or pod.reason
    if passed_disk_limit(pod):
        message = f"Pod {pod.name} was evicted: {pod.message}"
        return Symptom(FailureClass.DISK_FULL, DISK_LIMIT, message, pod, at=pod.deleting_at)
    if reason in _NODE_LOST:
        message = f"Pod {pod.name} lost its node: {detail or reason}"
        return Symptom(FailureClass.NODE_LOST, reason, message, pod, at=pod.deleting_at)
    if reason in _EVICTED:
        message = f"Pod {pod.name} was taken off its node: {detail or reason}"
        return Symptom(FailureClass.EVICTED, reason, message, pod, at=pod.deleting_at)
    return None


def _diagnose_deletion(pod: PodView) -> Symptom:
    """Somebody asked the pod to stop, and Kubernetes does not say why: people, or what drains a node by deleting."""
    message = f"Pod {pod.name} was asked to stop"
    return Symptom(FailureClass.POD_LOST, "Deleted", message, pod, at=pod.deleting_at)


def _find_taken(causes: Sequence[Symptom], pods: Sequence[PodView], seen: Mapping[str, datetime]) -> Symptom | None:
    """What ``causes`` come from where a pod of the gang was taken away before any of them: its peers fail by that."""
    failed = [cause.pod for cause in causes if cause.pod is not None]
    if len(failed) < len(causes) or any(cause.failure_class in _NEVER_BY_ENDING for cause in causes):
        return None
    for pod in pods:
        if all(was_asked_first(pod, other, seen) for other in failed):
            own = next((cause for cause in causes if cause.pod is pod), None)
            return own or _diagnose_disruption(pod) or _diagnose_deletion(pod)
    return None


def find_silent(symptoms: Sequence[Symptom], pods: Sequence[PodView]) -> list[PodView]:
    """The pods that say nothing while their peers have only lost a peer: hung, or on a node that is gone.

    One that was asked to stop is saving a checkpoint: it ends, or counts as lost once its time for that is over.
    Those whose node does not answer come first: its node controller marks pods as not ready once it has not heard from
    the kubelet for 50 s (--node-monitor-grace-period, Kubernetes 1.32).
    """
    if any(symptom.failure_class != FailureClass.PEER_LOST for symptom in symptoms):
        return []
    quiet = (pod for pod in pods if not pod.has_ended and pod.deleting_at is None)
    return sorted(quiet, key=lambda pod: not is_off(pod))


def is_off(pod: PodView) -> bool:
    """Whether the node of a pod that runs no longer answers."""
    return pod.running and pod.unready and pod.deleting_at is None


def diagnose_root(
    symptoms: Sequence[Symptom],
    pods: Sequence[PodView],
    attempt: int,
    now: datetime,
    seen: Mapping[str, datetime] = {},
) -> Failure:
    """The failure that explains all ``symptoms``: the earliest that is no echo of another pod's.

    Where every pod only lost a peer, the pod that says nothing is the suspect: in a hang, those that report the
    time-out are the innocent ones.
    """
    causes = _drop_echoes([symptom for symptom in symptoms if symptom.failure_class not in ECHOES])
    lost = [symptom for symptom in symptoms if symptom.failure_class == FailureClass.PEER_LOST]
    asked = [symptom for symptom in symptoms if symptom.failure_class == FailureClass.CHECKPOINTED]
    silent = find_silent(symptoms, pods)
    if causes:
        root = _find_taken(causes, pods, seen) or _earliest(causes, now)
    elif asked:
        root = next((symptom for symptom in asked if symptom.pod and symptom.pod.deleting_at), _earliest(asked, now))
    elif silent and is_off(silent[0]):
        first = _earliest(lost, now)
        message = f"Node of pod {silent[0].name} does not answer; {_words(first)}"
        root = Symptom(FailureClass.NODE_LOST, "NodeNotReady", message, silent[0], step=first.step, at=first.at)
    elif silent:
        first = _earliest(lost, now)
        message = f"Pod {silent[0].name} stopped answering its peers and says nothing itself; {_words(first)}"
        root = replace(first, message=message, reason=PEER_SILENT, pod=silent[0], rank=None, remedy="")
    else:
        root = _find_taken(lost, pods, seen) or _earliest(lost, now)
    ended = root.pod.ended if root.pod else None
    return Failure(
        attempt=attempt,
        failure_class=root.failure_class,
        reason=root.reason,
        message=root.message,
        remedy=root.remedy or RULES[root.failure_class].remedy,
        pod=root.pod.name if root.pod else None,
        node=(root.pod.node or None) if root.pod else None,
        rank=root.rank,
        step=root.step,
        micro_batch_size=root.micro_batch_size,
        exit_code=ended.exit_code if ended else None,
        log_tail=None,
        at=ended_at(root.pod, seen, now),
    )


def _drop_echoes(causes: Sequence[Symptom]) -> list[Symptom]:
    """``causes`` without those that another one of them brings about."""
    found = {symptom.failure_class for symptom in causes}
    return [symptom for symptom in causes if MAY_FOLLOW.get(symptom.failure_class) not in found]


def _earliest(symptoms: Iterable[Symptom], now: datetime) -> Symptom:
    return min(symptoms, key=lambda symptom: symptom.at or now)


def _words(symptom: Symptom) -> str:
    name = symptom.pod.name if symptom.pod else "a peer"
    return f"{name} reports: {symptom.message}"
