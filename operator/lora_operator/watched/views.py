"""What the operator keeps of Kubernetes objects: small frozen views instead of whole documents.

The parse functions are pure and total: a field that is missing reads as empty.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lora_api.run import CONTAINER_NAME
from lora_operator.names import (
    ATTEMPT_LABEL,
    CONTROLLER_LABEL,
    INDEX_LABEL,
    PREFLIGHT_LABEL,
    QUEUE_LABEL,
    RUN_LABEL,
    RUN_VERSION_ANNOTATION,
    UID_LABEL,
    child_name,
    preflight_name,
)
from lora_operator.objects import Key, controller_of, parse_time

_TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended: the trainer, or the init container of that name, after which no trainer starts.

    ``at`` is by the clock of the node.
    """

    exit_code: int
    reason: str
    message: str
    at: datetime | None
    init_container: str = ""


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of a gang. ``index`` is its number in the Job, which is its node rank.

    Others may have put containers beside the trainer: a mesh, an agent, a sidecar. ``waiting_reason``, ``running`` and
    ``ended`` are of the trainer, or of the init container that keeps it from starting.
    """

    namespace: str
    name: str
    uid: str
    version: int
    run: str
    attempt: int
    index: int
    job_uid: str
    """Empty: a copy that somebody made, for debugging, say. It is none of the gang."""
    created: datetime
    orphaned: bool = False
    """Somebody deleted its Job and let it live (--cascade=orphan): nobody deletes it any more."""
    copied: bool = False
    """A copy that the Job controller has taken for one of its own pods; it takes one of the two away."""
    run_uid: str = ""
    deleting_at: datetime | None = None
    stop_seconds: float = 0.0
    """So long the kubelet lets it stop, once it was asked to."""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    scheduled: bool = False
    scheduled_at: datetime | None = None
    node: str = ""
    unscheduled_reason: str = ""
    unscheduled_message: str = ""
    disruption: str = ""
    disruption_message: str = ""
    waiting_reason: str = ""
    waiting_message: str = ""
    memory_limited: bool = True
    """The kernel may end the trainer for what it uses itself; without a limit, only where the whole node is full."""
    init_container: str = ""
    """The init container that waits, or runs, before the trainer; or the sidecar that has not started."""
    running: bool = False
    sidecar_runs: bool = False
    """An ordinary container beside the trainer runs, or is to run: it may wait for an image that nobody has."""
    unready: bool = False
    """Kubernetes says that it is not ready, and no container of it is why. While it runs this is the node's fault."""
    ended: Ended | None = None
    tracked: bool = True
    """The Job controller will count how the pod ends. It lets go of pods that it deletes itself."""
    gone: bool = False
    """The object was deleted; this is the last that was seen of it."""

    @property
    def key(self) -> Key:
        """The run that the pod belongs to."""
        return self.namespace, self.run

    @property
    def is_starting(self) -> bool:
        """It has a node, and its container does not run yet."""
        return self.scheduled and not (self.running or self.has_ended)

    @property
    def has_ended(self) -> bool:
        """The trainer has ended, or will never start. A sidecar may run on."""
        return self.ended is not None or not self.holds_node

    @property
    def holds_node(self) -> bool:
        """Something of the pod runs or is to run, and it holds the GPUs that it asked for."""
        return not (self.gone or self.phase in ("Succeeded", "Failed"))

    @property
    def runs_on(self) -> bool:
        """The trainer has ended, and a sidecar keeps the pod and its GPUs.

        Without one the pod ends by itself: a kubelet says so a moment after the trainer has ended.
        """
        return self.has_ended and self.holds_node and self.sidecar_runs


@dataclass(frozen=True, slots=True)
class JobView:
    """The Job of one attempt, or of one preflight: then ``preflight`` is its number, and ``attempt`` is 0."""

    namespace: str
    name: str
    uid: str
    version: int
    run: str
    attempt: int
    owner_uid: str
    created: datetime
    preflight: int = 0
    size: int = 1
    deleting: bool = False
    failed_indexes: frozenset[int] = frozenset()
    completed_indexes: frozenset[int] = frozenset()
    failure: str = ""
    finished: bool = False
    stopping: bool = False
    suspended: bool = False
    was_suspended: bool = False
    """It is suspended, or was before."""
    started: datetime | None = None
    """When the Job controller came to it and might make its pods; ``None`` while it is suspended."""
    queue: str = ""
    """The queue of Kueue that it names."""
    image: str = ""
    """That of the trainer."""
    run_version: int = 1
    """Newest run document that its trainer reads, as far as the operator that made the Job knew."""

    @property
    def key(self) -> Key:
        """The run that the Job belongs to."""
        return self.namespace, self.run

    @property
    def has_own_name(self) -> bool:
        """Whether its name is that of what its labels say that it is. Of these there is only one."""
        named = preflight_name(self.run, self.preflight) if self.preflight else child_name(self.run, self.attempt)
        return self.name == named


def parse_pod(raw: Mapping[str, Any]) -> PodView:
    """The view of a pod."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    node = spec.get("nodeName") or ""
    labels = metadata.get("labels") or {}
    index = _number(labels.get(INDEX_LABEL))
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    has_node = scheduled.get("status") == "True"
    disruption = conditions.get("DisruptionTarget") or {}
    disrupted = disruption.get("status") == "True"
    state = _trainer_state(status)
    first = _InitContainers(spec, status) if "running" not in state and "terminated" not in state else None
    waiting, init_container = state.get("waiting") or {}, ""
    if first is not None and waiting.get("reason") in INITIALIZING:
        init_container, waiting = first.find_waiting() or (first.find_running() or first.find_starting(), waiting)
    refused = first.find_failed() if first is not None else None
    owned = bool(controller_of(metadata))
    made_by_job = str(metadata.get("generateName") or "").endswith(f"-{index}-")
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        run=labels.get(RUN_LABEL, ""),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        index=index,
        job_uid=_job_uid(metadata) if owned or made_by_job else "",
        created=_created(metadata),
        orphaned=not owned,
        copied=owned and not made_by_job,
        run_uid=labels.get(UID_LABEL, ""),
        deleting_at=parse_time(metadata.get("deletionTimestamp")),
        stop_seconds=float(metadata.get("deletionGracePeriodSeconds") or 0),
        phase=status.get("phase") or "Pending",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        scheduled=bool(node) or has_node,
        scheduled_at=parse_time(scheduled.get("lastTransitionTime")) if has_node else None,
        node=node,
        unscheduled_reason=scheduled.get("reason", "") if scheduled.get("status") == "False" else "",
        unscheduled_message=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        disruption=disruption.get("reason", "") if disrupted else "",
        disruption_message=disruption.get("message", "") if disrupted else "",
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        memory_limited=_has_memory_limit(spec),
        init_container=init_container,
        running="running" in state,
        sidecar_runs=_sidecar_runs(status),
        unready=_is_unready(conditions),
        ended=refused or _parse_ended(state.get("terminated")),
        tracked=_TRACKING_FINALIZER in (metadata.get("finalizers") or ()),
    )


def _sidecar_runs(status: Mapping[str, Any]) -> bool:
    """Whether a container beside the trainer runs, or is to run, which no kubelet ends."""
    others = (item for item in status.get("containerStatuses") or () if item.get("name") != CONTAINER_NAME)
    return any(not {"running", "waiting"}.isdisjoint(item.get("state") or {}) for item in others)


def _has_memory_limit(spec: Mapping[str, Any]) -> bool:
    """Whether the trainer has a memory limit: its own, that of a LimitRange, or one of the whole pod."""
    trainer = next((item for item in spec.get("containers") or () if item.get("name") == CONTAINER_NAME), None)
    asked = ((item or {}).get("resources") or {} for item in (trainer, spec))
    return trainer is None or any("memory" in (resources.get("limits") or {}) for resources in asked)


INITIALIZING = (None, "", "PodInitializing", "ContainerCreating")
"""What a container that waits for others says. Of an init container they tell as little as of the trainer."""

_SIDECAR = "Always"
_RESTARTING = (_SIDECAR, "OnFailure")
"""Restart policies of a container of its own. With ``Never``, and without any, its failure is that of the pod."""

_UNREADY_CONTAINERS = ("ContainersNotReady", "ReadinessGatesNotReady")


def _is_unready(conditions: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the node controller has marked the pod. A container that is not ready is told of by the kubelet.

    The trainer has no probe, but a sidecar may have one.
    """
    ready, containers = conditions.get("Ready") or {}, conditions.get("ContainersReady") or {}
    told_by_kubelet = ready.get("reason") in _UNREADY_CONTAINERS or containers.get("status") == "False"
    return ready.get("status") == "False" and not told_by_kubelet


def _trainer_state(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of the trainer's container. The kubelet sorts them by name, and a pod may have others."""
    states = (item.get("state") for item in status.get("containerStatuses") or () if item.get("name") == CONTAINER_NAME)
    return next(states, None) or {}


class _InitContainers:
    """What runs before the trainer: our own, and those that others have put into the pod."""

    def __init__(self, spec: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        containers = spec.get("initContainers") or ()
        # Those start again when they fail, so that how they end says nothing; sidecars are ended with the pod.
        self._restarted = {item.get("name") for item in containers if item.get("restartPolicy") in _RESTARTING}
        self._sidecars = {item.get("name") for item in containers if item.get("restartPolicy") == _SIDECAR}
        self._unstarted = {
            item.get("name") for item in status.get("initContainerStatuses") or () if item.get("started") is False
        }
        self._states = [
            (str(item.get("name", "")), item.get("state") or {}) for item in status.get("initContainerStatuses") or ()
        ]

    def find_waiting(self) -> tuple[str, Mapping[str, Any]] | None:
        """The first that waits for something that it says, and what it waits for."""
        waiting = ((name, state.get("waiting") or {}) for name, state in self._states)
        return next(((name, wait) for name, wait in waiting if wait.get("reason") not in INITIALIZING), None)

    def find_running(self) -> str:
        """The first that runs and is to end before the trainer starts."""
        running = (name for name, state in self._states if "running" in state and name not in self._sidecars)
        return next(running, "")

    def find_starting(self) -> str:
        """The first sidecar that runs and has not passed its startup probe, for which the others wait."""
        running = (name for name, state in self._states if "running" in state and name in self._unstarted)
        return next(running, "")

    def find_failed(self) -> Ended | None:
        """How the first ended that failed: the trainer does not start after it."""
        for name, state in self._states:
            terminated = state.get("terminated") or {}
            if terminated.get("exitCode") and name not in self._restarted:
                return _parse_ended(terminated, name)
        return None


def _parse_ended(terminated: Mapping[str, Any] | None, init_container: str = "") -> Ended | None:
    if terminated is None:
        return None
    return Ended(
        exit_code=terminated.get("exitCode", 0),
        reason=terminated.get("reason") or "",
        message=terminated.get("message") or "",
        at=parse_time(terminated.get("finishedAt")),
        init_container=init_container,
    )


def parse_job(raw: Mapping[str, Any]) -> JobView:
    """The view of a Job."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or () if item.get("status") == "True"}
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    return JobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        run=labels.get(RUN_LABEL, ""),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        owner_uid=_controller_uid(metadata),
        created=_created(metadata),
        preflight=_number(labels.get(PREFLIGHT_LABEL)),
        size=spec.get("completions") or 1,
        deleting=bool(metadata.get("deletionTimestamp")),
        failed_indexes=parse_indexes(status.get("failedIndexes") or ""),
        completed_indexes=parse_indexes(status.get("completedIndexes") or ""),
        failure=f"{failed.get('reason', '')}: {failed.get('message', '')}" if failed else "",
        finished="Failed" in conditions or "Complete" in conditions,
        stopping=spec.get("maxFailedIndexes") is not None,
        suspended=bool(spec.get("suspend")),
        was_suspended=bool(spec.get("suspend"))
        or any(item.get("type") == "Suspended" for item in status.get("conditions") or ()),
        started=parse_time(status.get("startTime")),
        queue=labels.get(QUEUE_LABEL, ""),
        image=_trainer_image(spec),
        run_version=_number((metadata.get("annotations") or {}).get(RUN_VERSION_ANNOTATION)) or 1,
    )


def _trainer_image(spec: Mapping[str, Any]) -> str:
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or ()
    images = (item.get("image") or "" for item in containers if item.get("name") == CONTAINER_NAME)
    return sys.intern(next(images, ""))  # many Jobs have the same


def parse_indexes(text: str) -> frozenset[int]:
    """The numbers in a Job's list of indexes, such as ``1,3-5,7``."""
    indexes: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        indexes.update(range(int(first), int(last or first) + 1))
    return frozenset(indexes)


def _controller_uid(metadata: Mapping[str, Any]) -> str:
    return str(controller_of(metadata).get("uid", ""))


def _job_uid(metadata: Mapping[str, Any]) -> str:
    """Uid of the Job that owns the pod, or that made it.

    A pod that is only made to look like one of the gang, by labels of ours or by an owner reference, has none.
    """
    uid = (metadata.get("labels") or {}).get(CONTROLLER_LABEL, "")
    return str(uid) if controller_of(metadata).get("uid", uid) == uid else ""


def _created(metadata: Mapping[str, Any]) -> datetime:
    return parse_time(metadata.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
