"""What the kubelet and the container runtime say of pods, and what it tells of their nodes. All pure."""

import re

from lora_api import FailureClass
from lora_operator.kube.podevents import OF_THE_NODE
from lora_operator.watched.views import Ended, PodView

NOT_STARTED = frozenset({"StartError", "ContainerCannotRun"})
"""Reasons of a container that its node could not start: the image is at fault, or what the node starts it with."""

_HELD_UP = frozenset({str(FailureClass.IMAGE_PULL_FAILED), str(FailureClass.POD_NOT_STARTED)})
"""Reasons of a container that does not start, by what the kubelet says that it waits for."""

NOT_READIED = OF_THE_NODE | _HELD_UP
"""Reasons of a pod that its node does not get ready, while others of its gang may be: see ``is_missing``."""

_MISSING = re.compile(
    r"(?:secret|configmap|persistentvolume|persistentvolumeclaim|serviceaccount|resourceclaim|secretproviderclass)"
    r'(?:es|s)?(?:\.[a-z0-9.-]+)? \\*"[^"]*" not found'
    r"|references non-existent (?:secret|config) key|couldn't find key .+ in (?:Secret|ConfigMap)",
    re.IGNORECASE,
)
"""What the kubelet says of objects that are not there (Kubernetes 1.29 to 1.37). A file or a driver is the node's."""

NODE_FULL = "NodeOutOfMemory"
"""Reason of a pod without a memory limit that the kernel ended: others of its node may have taken the memory."""

_REFUSALS = frozenset(
    {"UnexpectedAdmissionError", "NodeAffinity", "TopologyAffinityError", "SMTAlignmentError", "PodOSNotSupported",
     "PodOSSelectorNodeLabelDoesNotMatch", "UnexpectedPredicateFailureType", "InvalidNodeInfo", "AppArmor",
     "SysctlForbidden", "VolumeAttachmentLimitExceeded", "NodeCapacityExceeded", "PodFeatureUnsupported",
     "SupplementalGroupsPolicyNotSupported", "InitContainerRestartPolicyForbidden"}
)  # fmt: skip
_KINDS_OF_REFUSAL = ("OutOf", "PodLevelResources")
"""What reasons begin with with which a kubelet refuses a pod: OutOfcpu, OutOfnvidia.com/gpu, ..."""

_REFUSED = "Pod was rejected"
"""How the message of any pod begins that a kubelet refuses (Kubernetes 1.29 to 1.37): it adds reasons all the time."""

_STATUS_UNKNOWN = "ContainerStatusUnknown"
"""What the kubelet says of a container that it does not find any more, with exit code 137."""

_UNKNOWN = (255, "Unknown")
"""Exit code and reason of a container that ran when its node went down: containerd finds it so after the reboot."""

LOST_BY_NODE = frozenset({_STATUS_UNKNOWN, _UNKNOWN[1]})
"""Reasons of pods whose node no longer knows how they ended."""


def is_missing(words: str) -> bool:
    """Whether ``words`` are of an object that is missing, or of a key of it: so it is on every node."""
    return _MISSING.search(words) is not None


def is_unstarted(failure_class: FailureClass, reason: str) -> bool:
    """Whether a container was not started. Such a failure names its node where that may be at fault, and only there."""
    return str(failure_class) in _HELD_UP and (
        reason == str(failure_class) or (failure_class is FailureClass.POD_NOT_STARTED and reason in NOT_STARTED)
    )


def is_lost(ended: Ended) -> bool:
    """Whether the node knows no more how the container ended: it went down, or its runtime lost the container."""
    return ended.reason == _STATUS_UNKNOWN or (ended.exit_code, ended.reason) == _UNKNOWN


def is_refusal(reason: str) -> bool:
    """Whether a kubelet that refuses a pod gives it this reason."""
    return reason in _REFUSALS or reason.startswith(_KINDS_OF_REFUSAL)


def was_refused(pod: PodView) -> bool:
    """Whether the kubelet of its node did not take ``pod``, so that none of its containers ever ran."""
    never_ran = pod.phase == "Failed" and pod.ended is None
    return never_ran and (is_refusal(pod.reason) or pod.message.startswith(_REFUSED))


DISK_LIMIT = "DiskLimitExceeded"
"""Reason of a pod that used more of the disk than it may, which no other node changes."""

_DISK_LIMITS = ("ephemeral local storage usage exceeds", "exceeded its local ephemeral storage limit",
                "usage of emptydir volume", "usage exceeds the limit")  # fmt: skip
"""What the kubelet says of a pod, a container and a volume that pass their own limit (Kubernetes 1.29 to 1.37)."""


def passed_disk_limit(pod: PodView) -> bool:
    """Whether the kubelet evicted ``pod`` for what it has on the disk, whatever room its node has."""
    return any(text in pod.message.lower() for text in _DISK_LIMITS)
