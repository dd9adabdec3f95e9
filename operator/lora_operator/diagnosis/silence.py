"""Pods of which nobody says why they are not there, or have no node. All pure.

As a rule they come in a moment. Where they do not, whoever is to make them or to place them does not work, or was not
asked: nobody would write a condition or an Event then.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime

from lora_api import FailureClass
from lora_operator.diagnosis.findings import PATIENCE, Obstacle
from lora_operator.diagnosis.firstseen import unmade_seen, unplaced_seen
from lora_operator.state.reports import Reports
from lora_operator.watched.views import JobView, PodView
from lora_operator.wording import name_pods

QUIET = 60.0
"""Seconds for which nothing need be said of pods that are about to be made or placed."""

PODS_NOT_MADE, NO_SCHEDULER = "PodsNotMade", "NoScheduler"

_MAKER = "See whether the Job controller runs (kube-controller-manager), or what else spec.managedBy of the Job names."
_PLACER = (
    "See whether the scheduler that spec.schedulerName of the pods names runs, and what its log says; one that queues "
    "gangs tells more in their PodGroup. The run starts by itself then."
)


def count_unmade(pods: Sequence[PodView], job: JobView) -> int:
    """How many pods of ``job``, of which there are ``pods``, are not made; none while it is suspended."""
    made = {pod.index for pod in pods} | job.failed_indexes | job.completed_indexes
    return 0 if job.suspended else max(0, job.size - len(made))


def find_unplaced(pods: Sequence[PodView]) -> list[PodView]:
    """Those of ``pods`` that have no node, and of which no scheduler has said why."""
    waiting = (pod for pod in pods if not (pod.scheduled or pod.has_ended or pod.unscheduled_reason))
    return [pod for pod in waiting if pod.deleting_at is None]


def find_unspoken(pods: Sequence[PodView], job: JobView) -> Iterator[str]:
    """The sightings of what nobody speaks of."""
    if count_unmade(pods, job):
        yield unmade_seen(job)
    yield from map(unplaced_seen, find_unplaced(pods))


def diagnose_silence(pods: Sequence[PodView], job: JobView, reports: Reports, now: datetime) -> Obstacle | None:
    """What of ``job`` and its ``pods`` has been without a word for too long."""
    unmade = diagnose_unmade(pods, job, reports, now)
    if unmade is not None:
        return unmade
    seen = {pod.name: reports.seen.get(unplaced_seen(pod), now) for pod in find_unplaced(pods)}
    late = [name for name, first in seen.items() if _is_late(first, now)]
    if not late:
        return None
    return Obstacle(
        reason=NO_SCHEDULER,
        message=f"No scheduler has come to {name_pods(late)}",
        remedy=_PLACER,
        since=min(seen[name] for name in late),
        scheduling=True,
    )


def diagnose_unmade(pods: Sequence[PodView], job: JobView, reports: Reports, now: datetime) -> Obstacle | None:
    """Pods that nobody has made for too long, and nobody refuses."""
    missing, since = count_unmade(pods, job), reports.seen.get(unmade_seen(job), now)
    if not missing or reports.refusal is not None or not _is_late(since, now):
        return None
    return Obstacle(
        reason=PODS_NOT_MADE,
        message=f"{missing} of {job.size} pods of Job {job.name} are not made, and no Event says why",
        remedy=f"{_MAKER} The run starts by itself then.",
        since=since,
        failure_class=FailureClass.POD_NOT_STARTED,
        scheduling=True,
        limit=PATIENCE,
        final_remedy=f"{_MAKER} Then raise runPolicy.retry.",
    )


def _is_late(since: datetime, now: datetime) -> bool:
    return (now - since).total_seconds() >= QUIET
