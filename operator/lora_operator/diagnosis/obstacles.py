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
_LIMIT_RANGE = re.compile(r"per (Container|Pod) is|must be less than or equal to")
_SAYS_NOTHING = re.compile(r"(?:(?:requests|limits)\.)?(?:cpu|memory|ephemeral-storage)")
_QUOTA_REMEDY = "Wait until the quota has room, or raise it. The run starts by itself then."
_ROLE_REMEDY = "Bring the operator's role to its version (helm upgrade). The run starts by itself then."
_WEBHOOK_REMEDY = "See why the webhook that the message names does not answer. The run starts by itself once it does."
_POLICY_REMEDY = "Ask for what the policy in the message allows, or have it make an exception for the namespace."
_SIZE_REMEDY = (
    "Shorten what the specification says at length, such as dataset.chatTemplate or podTemplate.annotations, and "
    "create the run again."
)


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
                message=f"No node takes pod {pod.name}: {pod.unscheduled_message}",
                remedy=_scheduling_remedy(pod),
                since=pod.created,
                scheduling=True,
            )
    return None


def _scheduling_remedy(pod: PodView) -> str:
    if pod.unscheduled_reason == "SchedulingGated":
        return _GATED_REMEDY
    # The scheduler has one reason for all; of claims it says 'persistentvolumeclaim "x" not found' or "pod has unbound
    # immediate PersistentVolumeClaims" (Kubernetes 1.37).
    return _CLAIM_REMEDY if "persistentvolumeclaim" in pod.unscheduled_message.lower() else _SCHEDULING_REMEDY


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
    return Obstacle(
        reason="QuotaExceeded" if refusal.by_quota else str(FailureClass.POD_NOT_STARTED),
        message=f"Pods of Job {job.name} are refused: {words}",
        remedy=_refusal_remedy(job, words),
        since=refusal.since,
        failure_class=None if refusal.by_quota else FailureClass.POD_NOT_STARTED,
        scheduling=True,
    )


def _refusal_remedy(job: JobView, words: str) -> str:
    """What to do about pods that are refused, with the fields that the words are about."""
    whose = "podTemplate.resources of the run, or of its ClusterLoRARuntime"
    if job.preflight:
        whose = "preflightResources of the run's ClusterLoRARuntime (or podTemplate.resources, which it follows)"
    again = "then delete this LoRAFineTune and create it again"
    if "exceeded quota" in words:
        return f"{_QUOTA_REMEDY} To ask for less, change {whose}, {again}."
    _, says_nothing, rest = words.partition("must specify")
    if says_nothing:
        names = _SAYS_NOTHING.findall(rest)
        fields = sorted({name if "." in name else f"requests.{name}" for name in names})
        return (
            f"Set {', '.join(fields)} in {whose}, {again}; or give the namespace a LimitRange with defaults, and the "
            "run starts by itself."
        )
    if _LIMIT_RANGE.search(words):
        return f"Bring {whose} to what the LimitRange of the namespace allows, {again}; or have the LimitRange changed."
    return RULES[FailureClass.POD_NOT_STARTED].remedy


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
    if status == 413 or "template.annotations: Too long" in words:
        return str(FailureClass.BAD_SPEC), _SIZE_REMEDY, FailureClass.BAD_SPEC
    return str(FailureClass.POD_NOT_STARTED), _POLICY_REMEDY, FailureClass.POD_NOT_STARTED
