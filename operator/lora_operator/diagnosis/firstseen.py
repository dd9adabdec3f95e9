"""Since when something is so, by the operator's own clock. All pure.

The kubelet writes when a container began and ended, and the trainer when it said something: by the clock of their node,
which may be hours off. So none of that is compared with our time. What counts is when this operator saw it first, kept
in memory (``Reports.seen``). An operator that starts anew sees it anew, and rather waits once more than too short.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from lora_operator.state.observed import stop_seen
from lora_operator.state.reports import JOB
from lora_operator.watched.views import JobView, PodView

ORPHANS = "orphans"
"""The sighting of pods that hold up the next attempt, and that nobody deletes."""

LEFTOVERS = "leftovers"
"""The sighting of pods that hold up the next attempt, and are on their way out."""

_BELIEVED = 120.0
"""Seconds before an end was seen within which a time that a node tells is taken to put ends into their order."""


def job_seen(job: JobView) -> str:
    """The sighting of ``job`` itself."""
    return f"{JOB}{job.uid}"


def suspended_seen(job: JobView) -> str:
    """The sighting that ``job`` is suspended."""
    return f"suspended/{job.uid}"


def run_seen(job: JobView) -> str:
    """The sighting of a pod of ``job`` that runs."""
    return f"run/{job.uid}"


def held_up_seen(pod: PodView, reason: str) -> str:
    """The sighting of ``pod`` that does not start, for ``reason``."""
    return f"{reason}/{pod.uid}"


def starting_seen(pod: PodView) -> str:
    """The sighting of ``pod`` that has a node and does not run."""
    return f"start/{pod.uid}"


def warned_seen(pod: PodView) -> str:
    """The sighting of a warning about ``pod`` that has a node and does not run."""
    return f"warn/{pod.uid}"


def unmade_seen(job: JobView) -> str:
    """The sighting that pods of ``job`` are not made."""
    return f"unmade/{job.uid}"


def unplaced_seen(pod: PodView) -> str:
    """The sighting of ``pod`` that has no node, and of which no scheduler has said why."""
    return f"unplaced/{pod.uid}"


def end_seen(pod: PodView) -> str:
    """The sighting of the end of ``pod``."""
    return f"end/{pod.uid}"


def retry_seen(at: datetime) -> str:
    """The sighting of a status.retryTime."""
    return f"retry/{at.isoformat()}"


def started_seen(job: JobView) -> str:
    """The sighting that the Job controller has come to ``job``."""
    return f"started/{job.uid}"


def could_run_since(job: JobView, pod: PodView, now: datetime) -> datetime:
    """When a pod that runs already at our first look may have begun: by the clocks of the control plane."""
    made = min(now, job.started or job.created)
    got_node = pod.scheduled_at or made
    return got_node if made <= got_node <= now else made


def running_since(job: JobView, seen: Mapping[str, datetime], now: datetime) -> datetime:
    """Since when a pod of ``job`` runs, which does ``now``."""
    return seen.get(run_seen(job), now)


def ended_at(pod: PodView | None, seen: Mapping[str, datetime], now: datetime) -> datetime:
    """When it was seen that ``pod`` has ended."""
    return now if pod is None else min(now, seen.get(end_seen(pod), now))


def was_asked_first(pod: PodView, ended: PodView, seen: Mapping[str, datetime]) -> bool:
    """Whether ``pod`` was asked to stop before ``ended`` was seen to end, or nobody saw which came first."""
    if pod.deleting_at is None:
        return False
    stop, end = seen.get(stop_seen(pod)), seen.get(end_seen(ended))
    return stop is None or end is None or stop <= end


def can_be(at: datetime | None, pod: PodView | None, job: JobView, seen: Mapping[str, datetime]) -> bool:
    """Whether ``pod`` can have ended at ``at``, by the clock of its node.

    Such times put the ends of several pods into their order, finer than they can be seen. Of an end from before our
    first look at the Job we only know that the Job was made before it.
    """
    first = seen.get(end_seen(pod)) if pod is not None else None
    if at is None or first is None:
        return True
    before = seen.get(job_seen(job)) == first
    earliest = min(first, job.created) if before else first - timedelta(seconds=_BELIEVED)
    return earliest <= at <= first
