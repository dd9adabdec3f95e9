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
    child_name,
    preflight_name,
)
from lora_operator.objects import Key, controller_of, parse_time

_TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended."""

    exit_code: int
    reason: str
    message: str
    at: datetime | None


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of a gang. ``index`` is its number in the Job, which is its node rank."""

    namespace: str
    name: str
    uid: str
    version: int
    run: str
    attempt: int
    index: int
    job_uid: str
    created: datetime
    deleting_at: datetime | None = None
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    scheduled: bool = False
    node: str = ""
    unscheduled_reason: str = ""
    unscheduled_message: str = ""
    disruption: str = ""
    disruption_message: str = ""
    waiting_reason: str = ""
    waiting_message: str = ""
    running: bool = False
    unready: bool = False
    """Kubernetes says that it is not ready. Nothing probes it, so while it runs this is the node's fault."""
    started: datetime | None = None
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
    def has_ended(self) -> bool:
        """Nothing of the pod runs any more."""
        return self.gone or self.ended is not None or self.phase in ("Succeeded", "Failed")


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
    metadata, status = raw["metadata"], raw.get("status") or {}
    node = (raw.get("spec") or {}).get("nodeName") or ""
    labels = metadata.get("labels") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    disruption = conditions.get("DisruptionTarget") or {}
    disrupted = disruption.get("status") == "True"
    state, first = _state(status, "containerStatuses"), _state(status, "initContainerStatuses")
    # While the init container waits for an image or a Secret, or where it fails, the trainer says PodInitializing.
    waiting = first.get("waiting") or state.get("waiting") or {}
    refused = first.get("terminated") if (first.get("terminated") or {}).get("exitCode") else None
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        run=labels.get(RUN_LABEL, ""),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        index=_number(labels.get(INDEX_LABEL)),
        job_uid=_job_uid(metadata),
        created=_created(metadata),
        deleting_at=parse_time(metadata.get("deletionTimestamp")),
        phase=status.get("phase") or "Pending",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        scheduled=bool(node) or scheduled.get("status") == "True",
        node=node,
        unscheduled_reason=scheduled.get("reason", "") if scheduled.get("status") == "False" else "",
        unscheduled_message=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        disruption=disruption.get("reason", "") if disrupted else "",
        disruption_message=disruption.get("message", "") if disrupted else "",
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        running="running" in state,
        unready=(conditions.get("Ready") or {}).get("status") == "False",
        started=parse_time((state.get("running") or {}).get("startedAt")),
        ended=_parse_ended(state.get("terminated") or refused),
        tracked=_TRACKING_FINALIZER in (metadata.get("finalizers") or ()),
    )


def _state(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The state of the one container of ``kind`` that a pod of ours has."""
    containers = status.get(kind) or [{}]
    return containers[0].get("state") or {}


def _parse_ended(terminated: Mapping[str, Any] | None) -> Ended | None:
    if terminated is None:
        return None
    return Ended(
        exit_code=terminated.get("exitCode", 0),
        reason=terminated.get("reason") or "",
        message=terminated.get("message") or "",
        at=parse_time(terminated.get("finishedAt")),
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
    """Uid of the Job whose controller counts the pod: it goes by this label, and leaves alone what others own.

    A pod that is only made to look like one of the gang, by labels of ours or by an owner reference, has none.
    """
    uid = (metadata.get("labels") or {}).get(CONTROLLER_LABEL, "")
    return str(uid) if controller_of(metadata).get("uid", uid) == uid else ""


def _created(metadata: Mapping[str, Any]) -> datetime:
    return parse_time(metadata.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
