"""Pods that have a node, and whose trainer does not start. All pure.

They hold GPUs meanwhile. What blocks a pod by the Events of its kubelet may pass, and so it has the time of
--start-timeout from when it was seen first. Other warnings are told of, and cut nothing short. What merely takes long,
such as an init container that fetches data or a large image, has that of a preflight. Then the attempt ends, and the
next one may get other nodes.
"""

from collections.abc import Sequence
from datetime import datetime

from lora_api import FailureClass
from lora_operator.diagnosis.findings import Obstacle
from lora_operator.diagnosis.firstseen import starting_seen, warned_seen
from lora_operator.diagnosis.reasons import is_missing
from lora_operator.kube.podevents import BLOCKING
from lora_operator.state.reports import Reports
from lora_operator.watched.views import PodView

INIT_CONTAINER_RUNS = "InitContainerRuns"
"""Reason of a trainer that waits for an init container which goes on."""

POD_STARTING = "PodStarting"
"""Reason of a pod that has had its node for a while, of which nobody says anything."""

_BRIEF = 5.0
"""Seconds for which an init container may run before it is told of: those of a mesh are as quick."""

_QUIET = 60.0
"""Seconds for which a pod may say nothing before it is told of."""

_PROBE = "Unhealthy"
_EVENT_REMEDY = "See kubectl describe pod. The run starts by itself once its pods do."
_MISSING_REMEDY = "Make what the message names: a claim, a Secret or a key of it. The run starts by itself then."
_VOLUME_REMEDY = (
    "See the driver of the volume on node {node}, and the storage behind it. The run starts by itself then."
)
_NETWORK_REMEDY = (
    "See the network plugin and the container runtime of node {node}; the run starts by itself once they work, or once "
    "the pod is deleted and made on another node."
)
_EVENT_REMEDIES = {
    "FailedMount": _VOLUME_REMEDY,
    "FailedMapVolume": _VOLUME_REMEDY,
    "FailedAttachVolume": "Free the volume on its other node, or take one that many nodes may mount. The run starts by "
    "itself then.",
    "FailedCreatePodSandBox": _NETWORK_REMEDY,
    "NetworkNotReady": _NETWORK_REMEDY,
    "FailedPrepareDynamicResources": "See the driver of the devices on node {node}. The run starts by itself then.",
    _PROBE: "See the log of the container whose probe fails. The run starts by itself once the probe passes.",
}
"""By the reason of what a pod that has a node does not start for, where nothing is missing."""

_QUIET_REMEDY = (
    "See kubectl describe pod: an image that is pulled, or a volume that is attached, may take a while. The run starts "
    "by itself then."
)


def find_warned(pods: Sequence[PodView], reports: Reports) -> list[PodView]:
    """Those of ``pods`` that do not start because of what their Events warn of.

    An init container that runs has got over it, but for its own probes.
    """
    return [pod for pod in find_stuck(pods) if _warning_of(pod, reports)]


def find_stuck(pods: Sequence[PodView]) -> list[PodView]:
    """Those of ``pods`` that have a node and whose trainer has not started."""
    return [pod for pod in pods if pod.is_starting and pod.deleting_at is None]


def _warning_of(pod: PodView, reports: Reports) -> str:
    words = reports.pod_events.get(pod.uid, "")
    reason = words.partition(":")[0]
    blocks = reason == _PROBE if pod.init_container else reason in BLOCKING - {_PROBE}
    return words if blocks else ""


def diagnose_stuck(pods: Sequence[PodView], reports: Reports, now: datetime, patience: float) -> list[Obstacle]:
    """What keeps trainers from starting on the nodes that they have, what is warned of first.

    ``patience``: seconds for what merely takes long.
    """
    warned = find_warned(pods, reports)
    found = [_describe_warning(pod, _warning_of(pod, reports), reports, now) for pod in warned]
    slow = [pod for pod in find_stuck(pods) if pod not in warned]
    slow.sort(key=lambda pod: not pod.init_container)
    for pod in slow:
        since = reports.seen.get(starting_seen(pod), now)
        lasts = (now - since).total_seconds()
        if pod.init_container and lasts >= _BRIEF:
            found.append(_describe_init(pod, since, patience))
        elif lasts >= _QUIET:
            found.append(_describe_quiet(pod, reports.pod_events.get(pod.uid, ""), since, patience))
    return found


def _describe_warning(pod: PodView, words: str, reports: Reports, now: datetime) -> Obstacle:
    reason, missing = words.partition(":")[0], is_missing(words)
    remedy = _MISSING_REMEDY if missing else _EVENT_REMEDIES.get(reason, _EVENT_REMEDY)
    return Obstacle(
        reason=reason,
        message=f"Pod {pod.name} does not start: {words}",
        remedy=remedy.format(node=pod.node or "(unknown)"),
        since=reports.seen.get(warned_seen(pod), now),
        failure_class=FailureClass.POD_LOST,
        pod=None if missing else pod,
    )


def _describe_init(pod: PodView, since: datetime, patience: float) -> Obstacle:
    return Obstacle(
        reason=INIT_CONTAINER_RUNS,
        message=f"Pod {pod.name}: its init container {pod.init_container} runs, and the trainer starts once it has "
        "ended (a sidecar: once its startup probe passes)",
        remedy=f"If it takes longer than it should, see its log (kubectl logs {pod.name} -c {pod.init_container}). The "
        "run starts by itself then.",
        since=since,
        failure_class=FailureClass.POD_LOST,
        limit=patience,
        pod=pod,
    )


def _describe_quiet(pod: PodView, words: str, since: datetime, patience: float) -> Obstacle:
    """``words`` are those of a warning that blocks nothing, if there is one."""
    warned = f". Its newest warning, which need not be the reason: {words}" if words else ""
    return Obstacle(
        reason=POD_STARTING,
        message=f"Pod {pod.name} is on node {pod.node or '(unknown)'}, and its containers do not run yet{warned}",
        remedy=_QUIET_REMEDY,
        since=since,
        failure_class=FailureClass.POD_LOST,
        limit=patience,
        pod=pod,
    )
