"""What keeps an attempt from starting: its pods do not run, or what it is made of is refused. Pure."""

import re
from collections.abc import Sequence
from datetime import datetime

from lora_api import RULES, FailureClass
from lora_operator.diagnosis.diagnose import Obstacle
from lora_operator.state.reports import Refusal, Reports
from lora_operator.watched.views import JobView, PodView

_IMAGE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
     "RegistryUnavailable", "SignatureValidationFailed"}
)  # fmt: skip
_CONFIG = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"})
_SCHEDULING_REMEDY = (
    "Free or add nodes that have what the pods ask for (kubectl describe pod shows it), or ask for less in "
    "podTemplate.resources or parallelism. The run starts by itself once they fit."
)
_CLAIM_REMEDY = (
    "Create the claim in the run's namespace, correct the pvc:// URI, or see why the claim is not bound (kubectl "
    "describe pvc). The run starts by itself once it is."
)
_GATED_REMEDY = "Nothing to do: whoever set the pod's scheduling gates removes them."
_QUOTA_REMEDY = "Wait until the quota has room, or raise it. The run starts by itself then."
_ROLE_REMEDY = "Bring the operator's role to its version (helm upgrade). The run starts by itself then."
_PRIORITY_REMEDY = "Create the PriorityClass that the message names. The run starts by itself then."
_PATIENCE = 86_400.0
"""Seconds for which is waited what somebody has to mend, and what is nothing of the run's own."""
_MOST_NAMES = 5
"""Pods that a message names; of more it gives the number."""
_WEBHOOK_REMEDY = "See why the webhook that the message names does not answer. The run starts by itself once it does."
_POLICY_REMEDY = "Ask for what the policy in the message allows, or have it make an exception for the namespace."
_SIZE_REMEDY = "Shorten what the specification says at length, and create the run again."


def diagnose_obstacle(pods: Sequence[PodView], job: JobView, reports: Reports) -> Obstacle | None:
    """What is in the way of ``job``, the worst first."""
    starting = [pod for pod in pods if not pod.has_ended and not pod.running]
    for pod in starting:
        if pod.waiting_reason in _IMAGE:
            return _fatal(FailureClass.IMAGE_PULL_FAILED, "Image of", pod)
    for pod in starting:
        if pod.waiting_reason in _CONFIG:
            return _fatal(FailureClass.POD_NOT_STARTED, "Container of", pod)
    if reports.refusal:
        return _refused(job, reports.refusal)
    for pod in starting:
        if pod.unscheduled_reason:
            return Obstacle(
                reason=pod.unscheduled_reason,
                message=describe_unscheduled(starting),
                remedy=_scheduling_remedy(pod),
                since=pod.created,
                scheduling=True,
            )
    return None


def describe_unscheduled(pods: Sequence[PodView]) -> str:
    """Which of ``pods`` wait for a node, and why: the scheduler's words, each of them once."""
    waiting: dict[str, list[str]] = {}
    for pod in pods:
        if pod.unscheduled_reason and not pod.has_ended:
            waiting.setdefault(pod.unscheduled_message, []).append(pod.name)
    *others, last = [f"No node takes {_name_pods(names)}: {words}".rstrip(": ") for words, names in waiting.items()]
    return "; ".join([*(text.rstrip(".") for text in others), last])


def _name_pods(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"pod {names[0]}"
    more = len(names) - _MOST_NAMES
    return f"pods {', '.join(names[:_MOST_NAMES])}" + (f" and {more} more" if more > 0 else "")


def waits_for_claim(pod: PodView) -> bool:
    """Whether ``pod`` has no node because a claim of it is missing or not bound: room would not help it."""
    # The scheduler has one reason for all; of claims it says 'persistentvolumeclaim "x" not found' or "pod has unbound
    # immediate PersistentVolumeClaims" (Kubernetes 1.37).
    return "persistentvolumeclaim" in pod.unscheduled_message.lower()


def _scheduling_remedy(pod: PodView) -> str:
    if pod.unscheduled_reason == "SchedulingGated":
        return _GATED_REMEDY
    return _CLAIM_REMEDY if waits_for_claim(pod) else _SCHEDULING_REMEDY


def _fatal(failure_class: FailureClass, what: str, pod: PodView) -> Obstacle:
    """``reason`` is the class: Kubernetes' own word changes with every try, and each change would be a write."""
    return Obstacle(
        reason=str(failure_class),
        message=f"{what} pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}".rstrip(": "),
        remedy=RULES[failure_class].remedy,
        since=pod.created,
        failure_class=failure_class,
    )


def _refused(job: JobView, refusal: Refusal) -> Obstacle:
    """Each try of the Job controller is of another pod: its name is left out, as each change would be a write."""
    words = re.sub(rf'pods "{re.escape(job.name)}-[^"]*" is forbidden: ', "", refusal.message)
    reason, remedy, limit = _REFUSALS[refusal.kind]
    return Obstacle(
        reason=reason,
        message=f"Pods of Job {job.name} are refused: {words}",
        remedy=remedy,
        since=refusal.since,
        failure_class=None if refusal.kind == "quota" else FailureClass.POD_NOT_STARTED,
        scheduling=True,
        limit=limit,
    )


_REFUSALS = {
    "quota": ("QuotaExceeded", _QUOTA_REMEDY, None),
    "webhook": ("WebhookFailed", _WEBHOOK_REMEDY, _PATIENCE),
    "priority": ("PriorityClassNotFound", _PRIORITY_REMEDY, _PATIENCE),
    "policy": (str(FailureClass.POD_NOT_STARTED), RULES[FailureClass.POD_NOT_STARTED].remedy, None),
}
"""Reason and remedy of pods that are refused, and for how long that is waited for, where it is not the usual time."""


def diagnose_refusal(kind: str, name: str, status: int, words: str, since: datetime) -> Obstacle | None:
    """Why the API server refuses to create a ``kind``, by its HTTP ``status`` and ``words``.

    ``None``: an error that passes, or that no status can tell of because the namespace is going.
    """
    if "being terminated" in words or status not in (400, 403, 413, 422, 500):
        return None
    found = _describe_refusal(kind, status, words)
    if found is None:
        return None
    reason, remedy, failure_class = found
    return Obstacle(
        reason=reason,
        message=f"{kind} {name} is refused: {words}",
        remedy=remedy,
        since=since,
        failure_class=failure_class,
        permanent=failure_class is FailureClass.BAD_SPEC,
    )


def _describe_refusal(kind: str, status: int, words: str) -> tuple[str, str, FailureClass | None] | None:
    """Reason, remedy, and what the run fails with if it lasts."""
    if status == 500:  # webhooks that fail answer with it, and so does an API server that is not well
        return ("WebhookFailed", _WEBHOOK_REMEDY, None) if "webhook" in words else None
    if "exceeded quota" in words:
        return "QuotaExceeded", _QUOTA_REMEDY, None
    if status == 403 and 'User "' in words and "cannot create" in words:
        return "OperatorForbidden", _ROLE_REMEDY, None
    if status == 413 or (kind == "ConfigMap" and "Too long" in words):
        return str(FailureClass.BAD_SPEC), _SIZE_REMEDY, FailureClass.BAD_SPEC
    return str(FailureClass.POD_NOT_STARTED), _POLICY_REMEDY, FailureClass.POD_NOT_STARTED
