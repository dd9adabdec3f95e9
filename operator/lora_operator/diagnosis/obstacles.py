"""What keeps an attempt from starting: its pods do not run, or what it is made of is refused. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from lora_api import RULES, FailureClass
from lora_operator.diagnosis.diagnose import INIT_CONTAINER_FAILED, describe_init_remedy
from lora_operator.diagnosis.findings import PATIENCE, Obstacle
from lora_operator.diagnosis.firstseen import held_up_seen
from lora_operator.diagnosis.invalid import describe_remedy, translate
from lora_operator.diagnosis.reasons import is_missing
from lora_operator.diagnosis.silence import diagnose_silence
from lora_operator.diagnosis.stuck import diagnose_stuck
from lora_operator.state.reports import Refusal, Refuser, Reports, find_refuser
from lora_operator.watched.views import INITIALIZING, JobView, PodView
from lora_operator.wording import name_pods

_IMAGE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
     "RegistryUnavailable", "SignatureValidationFailed"}
)  # fmt: skip
_HOLDS_UP: Mapping[str, FailureClass] = {
    **dict.fromkeys(_IMAGE, FailureClass.IMAGE_PULL_FAILED),
    "CrashLoopBackOff": FailureClass.POD_LOST,  # of a sidecar before the trainer: that has no second start
}
"""What the kubelet says of a container that does not start, and what the run fails with if that lasts.

Whatever else it says is that a container cannot be made or started (``PodNotStarted``): it learns new words.
"""
_WORST_FIRST = (FailureClass.IMAGE_PULL_FAILED, FailureClass.POD_NOT_STARTED, FailureClass.POD_LOST)
_OF_THE_RUN = _IMAGE | {"CreateContainerConfigError"}
"""What the kubelet says where the run itself is at fault, as a rule: no other node would say anything else."""
_DISK = re.compile(r"no space left on device|read-only file system|input/output error", re.IGNORECASE)
"""Words about the disk of a node, whatever the kubelet says that they are about."""
_THROTTLED = re.compile(r"too ?many ?requests|rate limit|QPS exceeded", re.IGNORECASE)
"""Words of a registry or a kubelet that lets in one pull after the other: no other node would be faster."""

_FAILED_CREATE = "FailedCreate"
"""Reason of a refusal that is no denial that is known, so that it may pass."""

_SCHEDULING_REMEDY = (
    "Free or add nodes that have what the pods ask for (kubectl describe pod shows it), or ask for less in "
    "podTemplate.resources or parallelism. The run starts by itself once they fit."
)
_CLAIM_REMEDY = (
    "Create the claim in the run's namespace, correct the pvc:// URI, or see why the claim is not bound (kubectl "
    "describe pvc). The run starts by itself once it is."
)
_GATED_REMEDY = (
    "See why whoever set the pod's scheduling gates (spec.schedulingGates) does not remove them. The run starts by "
    "itself then."
)
_ONE_POD = "ReadWriteOncePod"
_ONE_POD_REMEDY = (
    "The claim is in use, and its access mode lets one pod of the whole cluster use it: give the run a claim that is "
    "ReadWriteMany or ReadOnlyMany. If another run has it, this one starts by itself after that."
)
_NODE_REMEDY = "See the disk, the devices and the container runtime of node {node}. "
_LAGS_REMEDY = (
    "Other pods of the run have started, so see node {node}: its disk, its devices, its container runtime, and whether "
    "it reaches the registry. The run starts by itself then."
)
_THROTTLED_REMEDY = "Wait: other pods of the run have the image. If it lasts, have the registry allow more."
_LIMIT_RANGE = re.compile(r"per (Container|Pod) is|must be less than or equal to")
_SAYS_NOTHING = re.compile(r"(?:(?:requests|limits)\.)?(?:cpu|memory|ephemeral-storage)")
_QUOTA_WAITS = "Wait until the quota has room, or raise it. The run starts by itself then."
_QUOTA_ENDS = "Have the quota raised, or see what uses it. Once it has room, raise runPolicy.retry."
_QUEUES = 7 * PATIENCE
"""The same for a quota that is full: others work with it, as a rule, and a run that waits for it holds nothing."""
_SIZE_REMEDY = (
    "Shorten what the specification says at length, such as dataset.chatTemplate or podTemplate.annotations, and "
    "create the run again."
)

_BY_ITSELF, _RETRY = "and the run starts by itself", "and raise runPolicy.retry"


@dataclass(frozen=True)
class _Remedy:
    """What to do while the run waits, and once it has failed for that: then nothing starts by itself any more."""

    waiting: str
    final: str = ""


def _either(text: str) -> _Remedy:
    return _Remedy(f"{text}, {_BY_ITSELF}.", f"{text}, {_RETRY}.")


_QUOTA = _Remedy(_QUOTA_WAITS, _QUOTA_ENDS)
_ROLE = _either("Bring the operator's role to its version (helm upgrade)")
_WEBHOOK = _Remedy(
    "See why the webhook that the message names does not answer. The run starts by itself once it does.",
    "See why the webhook that the message names does not answer. Once it does, raise runPolicy.retry.",
)
_PRIORITY = _either("Create the PriorityClass that the message names")
_UNKNOWN = _Remedy(
    "This may pass by itself. If it lasts, see what the message names: the API server, its admission, or what the pods "
    "need and is not there. The run starts by itself once its pods can be made.",
    "See what the message names: the API server, its admission, or what the pods need and is not there. Once that is "
    "mended, raise runPolicy.retry.",
)
_POLICY = _either(
    "Ask for what the policy in the message allows, in a new run; or have it make an exception for the namespace"
)
_INVALID = _either(
    "Correct what the message names: a field of the run, in a new run, or what a webhook of the cluster has put there"
)


def find_held_up(pods: Sequence[PodView]) -> list[tuple[FailureClass, PodView]]:
    """The pods whose containers are kept from starting, each with what the run fails with for that, the worst first."""
    found = [(_kind_of(pod), pod) for pod in _starting(pods) if pod.waiting_reason not in INITIALIZING]
    return sorted(found, key=lambda one: _WORST_FIRST.index(one[0]))


def _kind_of(pod: PodView) -> FailureClass:
    return _HOLDS_UP.get(pod.waiting_reason, FailureClass.POD_NOT_STARTED)


def _starting(pods: Sequence[PodView]) -> list[PodView]:
    return [pod for pod in pods if not pod.has_ended and not pod.running]


def diagnose_obstacle(
    pods: Sequence[PodView],
    job: JobView,
    reports: Reports,
    now: datetime,
    *,
    limit: float = 600.0,
    patience: float = 3600.0,
) -> Obstacle | None:
    """What is in the way of ``job``, the worst first.

    ``limit``: seconds that what does not start has, ``patience``: those that what starts slowly has.

    What keeps a container from starting counts from when it was seen first of its pod, and from then anew where it had
    passed: a pod may have waited long for its node before, and what pulls an image tries again by itself.
    """
    starting = _starting(pods)
    held_up = [(reports.seen.get(held_up_seen(pod, kind), now), pod) for kind, pod in find_held_up(pods)]
    if held_up:
        since, pod = min(held_up, key=lambda one: one[0])
        return _describe_held_up(pod, pods, since)
    if reports.refusal:
        return diagnose_refused(job, reports.refusal)
    stuck = sorted(diagnose_stuck(pods, reports, now, patience), key=lambda one: one.seconds_left(now, limit) or 0.0)
    if stuck and (stuck[0].seconds_left(now, limit) or 0.0) <= 0:
        return stuck[0]
    for pod in starting:
        if pod.unscheduled_reason:
            return Obstacle(
                reason=pod.unscheduled_reason,
                message=describe_unscheduled(starting),
                remedy=scheduling_remedy(pod),
                since=pod.created,
                scheduling=True,
            )
    return stuck[0] if stuck else diagnose_silence(pods, job, reports, now)


def find_unscheduled(pods: Sequence[PodView]) -> list[PodView]:
    """The pods without a node of which a scheduler has said why."""
    return [pod for pod in pods if pod.unscheduled_reason and not (pod.scheduled or pod.has_ended)]


def describe_unscheduled(pods: Sequence[PodView]) -> str:
    """Which of ``pods`` wait for a node, and why: the scheduler's words, each of them once."""
    waiting: dict[str, list[str]] = {}
    for pod in pods:
        if pod.unscheduled_reason and not pod.has_ended:
            waiting.setdefault(pod.unscheduled_message, []).append(pod.name)
    *others, last = [f"No node takes {name_pods(names)}: {words}".rstrip(": ") for words, names in waiting.items()]
    return "; ".join([*(text.rstrip(".") for text in others), last])


def waits_for_claim(pod: PodView) -> bool:
    """Whether ``pod`` has no node because a claim of it is missing or not bound: room would not help it."""
    # The scheduler has one reason for all; of claims it says 'persistentvolumeclaim "x" not found' or "pod has unbound
    # immediate PersistentVolumeClaims" (Kubernetes 1.37).
    return "persistentvolumeclaim" in pod.unscheduled_message.lower()


def scheduling_remedy(pod: PodView) -> str:
    """What to do about ``pod``, which has no node."""
    if pod.unscheduled_reason == "SchedulingGated":
        return _GATED_REMEDY
    if _ONE_POD in pod.unscheduled_message:
        return _ONE_POD_REMEDY
    return _CLAIM_REMEDY if waits_for_claim(pod) else _SCHEDULING_REMEDY


def _describe_held_up(pod: PodView, pods: Sequence[PodView], since: datetime) -> Obstacle:
    """Why the container of ``pod`` does not start, which is one of the gang ``pods``.

    ``reason`` is a class: Kubernetes' own word changes with every try, and each change would be a write. What another
    pod of the gang has got over is no fault of the run: the attempt ends, and another one follows.
    """
    kind, words = _kind_of(pod), pod.waiting_message
    if kind is FailureClass.POD_LOST:
        return _describe_crash(pod, since)
    here = not is_missing(words)  # what is missing is missing on every node
    lags = here and any(other.running for other in pods)
    throttled = kind is FailureClass.IMAGE_PULL_FAILED and _THROTTLED.search(words) is not None
    of_node = here and not throttled and (lags or _may_be_of_its_node(pod, pods))
    node, rule = pod.node if of_node else "", RULES[kind]
    first = _NODE_REMEDY.format(node=node) if node else ""
    found = Obstacle(
        reason=str(kind),
        message=_say_waiting("Image" if kind is FailureClass.IMAGE_PULL_FAILED else "Container", pod, node),
        remedy=f"{first}{rule.waiting_remedy or rule.remedy}",
        final_remedy=f"{first}{rule.remedy}",
        since=since,
        failure_class=kind,
        pod=pod if node else None,
    )
    if not lags:
        return found
    remedy = _THROTTLED_REMEDY if throttled else _LAGS_REMEDY.format(node=pod.node or "(unknown)")
    return replace(found, failure_class=FailureClass.POD_LOST, remedy=remedy, final_remedy="")


def _describe_crash(pod: PodView, since: datetime) -> Obstacle:
    """A sidecar that has to run before the trainer, and ends each time. Its log says why."""
    return Obstacle(
        reason=INIT_CONTAINER_FAILED,
        message=_say_waiting("Container", pod),
        remedy=describe_init_remedy(pod.name, pod.init_container),
        since=since,
        failure_class=FailureClass.POD_LOST,
    )


def _say_waiting(what: str, pod: PodView, node: str = "") -> str:
    where = f" on node {node}" if node else ""
    where += f", init container {pod.init_container}" if pod.init_container else ""
    return f"{what} of pod {pod.name}{where}: {pod.waiting_reason}: {pod.waiting_message}".rstrip(": ")


def _may_be_of_its_node(pod: PodView, pods: Sequence[PodView]) -> bool:
    """Whether another node may start the container of ``pod``, as far as a gang tells of which none runs."""
    others = [other for kind, other in find_held_up(pods) if kind is _kind_of(pod)]
    alone = all(other.node == pod.node for other in others)
    return alone and (pod.waiting_reason not in _OF_THE_RUN or _DISK.search(pod.waiting_message) is not None)


def diagnose_refused(job: JobView, refusal: Refusal) -> Obstacle:
    """Why no pods are made for ``job``.

    Each try of the Job controller is of another pod: its name is left out, as each change would be a write.
    """
    words = re.sub(rf'pods "{re.escape(job.name)}-[^"]*" is forbidden: ', "", refusal.message)
    reason, remedy, limit = _REFUSALS[refusal.kind]
    told = _refusal_remedy(job, words) if remedy is None else remedy
    return Obstacle(
        reason=reason,
        message=f"Pods of Job {job.name} are refused: {words}",
        remedy=told.waiting,
        since=refusal.since,
        failure_class=FailureClass.POD_NOT_STARTED,
        scheduling=True,
        limit=limit,
        final_remedy=told.final,
    )


_REFUSALS: dict[Refuser, tuple[str, _Remedy | None, float | None]] = {
    "quota": ("QuotaExceeded", None, _QUEUES),
    "webhook": ("WebhookFailed", _WEBHOOK, PATIENCE),
    "priority": ("PriorityClassNotFound", _PRIORITY, PATIENCE),
    "policy": (str(FailureClass.POD_NOT_STARTED), None, None),
    "unknown": (_FAILED_CREATE, _UNKNOWN, PATIENCE),
}
"""Reason and remedy of pods that are refused, and for how long that is waited for, where it is not the usual time.

The remedy is ``None`` where it goes by the words.
"""


def _refusal_remedy(job: JobView, words: str) -> _Remedy:
    """What to do about pods that are refused, with the fields that the words are about."""
    whose = "podTemplate.resources of the run, or of its ClusterLoRARuntime"
    if job.preflight:
        whose = "preflightResources of the run's ClusterLoRARuntime (or podTemplate.resources, which it follows)"
    again = "then delete this LoRAFineTune and create it again"
    if find_refuser(words) == "quota":
        less = f"To ask for less, change {whose}, {again}."
        return _Remedy(f"{_QUOTA_WAITS} {less}", f"{_QUOTA_ENDS} {less}")
    _, says_nothing, rest = words.partition("must specify")
    if says_nothing:
        names = _SAYS_NOTHING.findall(rest)
        fields = sorted({name if "." in name else f"requests.{name}" for name in names})
        return _either(f"Set {', '.join(fields)} in {whose}, {again}; or give the namespace a LimitRange with defaults")
    if is_by_limit_range(words):
        return _either(
            f"Bring {whose} to what the LimitRange of the namespace allows, {again}; or have the LimitRange changed"
        )
    rule = RULES[FailureClass.POD_NOT_STARTED]
    return _Remedy(rule.waiting_remedy, rule.remedy)


def is_by_limit_range(words: str) -> bool:
    """Whether pods are refused for how much they ask for, or how little."""
    return find_refuser(words) != "quota" and _LIMIT_RANGE.search(words) is not None


def diagnose_refusal(kind: str, name: str, status: int, words: str, since: datetime) -> Obstacle | None:
    """Why the API server refuses to create a ``kind``, by its HTTP ``status`` and ``words``.

    ``None``: an error that passes, or that no status can tell of because the namespace is going.
    """
    if "being terminated" in words or status not in (400, 403, 413, 422, 500):
        return None
    own = translate(words) if status == 422 and "Too long" not in words else None
    if own is not None:
        return Obstacle(
            reason=str(FailureClass.BAD_SPEC),
            message=f"{own.rstrip('.')} ({kind} {name} is refused)",
            remedy=describe_remedy(own),
            since=since,
            failure_class=FailureClass.BAD_SPEC,
            permanent=True,
        )
    found = _describe_refusal(status, words)
    if found is None:
        return None
    reason, remedy, failure_class, limit = found
    return Obstacle(
        reason=reason,
        message=f"{kind} {name} is refused: {words}",
        remedy=remedy.waiting,
        since=since,
        failure_class=failure_class,
        permanent=failure_class is FailureClass.BAD_SPEC,
        limit=limit,
        final_remedy=remedy.final,
    )


def _describe_refusal(status: int, words: str) -> tuple[str, _Remedy, FailureClass, float | None] | None:
    """Reason, remedy, what the run fails with if it lasts, and for how long it is waited for, if not the usual time."""
    refuser, ends = find_refuser(words), FailureClass.POD_NOT_STARTED
    if refuser == "quota":
        return "QuotaExceeded", _QUOTA, ends, _QUEUES
    if refuser == "webhook" or (status == 500 and "webhook" in words):
        return "WebhookFailed", _WEBHOOK, ends, PATIENCE
    if status == 500:  # so answers an API server that is not well
        return None
    if status == 403 and 'User "' in words and "cannot create" in words:
        return "OperatorForbidden", _ROLE, ends, PATIENCE
    if status == 413 or "template.annotations: Too long" in words:
        return str(FailureClass.BAD_SPEC), _Remedy(_SIZE_REMEDY), FailureClass.BAD_SPEC, None
    if status == 403 and refuser == "unknown":
        return _FAILED_CREATE, _UNKNOWN, ends, PATIENCE
    return str(ends), _INVALID if " is invalid: " in words else _POLICY, ends, None
