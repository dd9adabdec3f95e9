"""What to read beside the looks, and when: logs, Events and queues, which no watch shows. All pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from lora_operator.clock import is_due
from lora_operator.diagnosis.firstseen import job_seen, started_seen, starting_seen
from lora_operator.diagnosis.silence import QUIET, find_unspoken
from lora_operator.diagnosis.stuck import find_stuck
from lora_operator.lifecycle.queued import is_stopping
from lora_operator.policies.stall import seconds_to_stall
from lora_operator.settings import RunSettings
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.watched.views import JobView, PodView

REFUSAL_DELAY = 3.0
"""Seconds that the Job controller has to make a Job's pods before the operator asks why it does not."""

POD_DELAY = 5.0
"""Seconds that a pod which has a node has to start before the operator asks why it does not."""

ASKED_PODS = 3
"""Of so many pods of a gang the Events are read at a time: those that were not read first, then each in its turn."""

QUEUE_INTERVAL = 600.0
"""Longest time in seconds between two questions to Kueue about a run that waits."""


@dataclass(frozen=True)
class ProgressOf:
    """How far a gang is, by the end of rank 0's log."""

    pod: PodView


@dataclass(frozen=True)
class LastWordsOf:
    """The end of a pod's log, which goes on record with a failure."""

    pod: PodView


@dataclass(frozen=True)
class EventsOfPods:
    """Why ``pods`` do not start, by their Events."""

    job: JobView
    pods: tuple[PodView, ...]


@dataclass(frozen=True)
class RefusalOf:
    """Why pods of a Job are not made, by its Events."""

    job: JobView


@dataclass(frozen=True)
class QueueOf:
    """Why a suspended Job waits, by what Kueue says."""

    job: JobView


Want: TypeAlias = ProgressOf | LastWordsOf | EventsOfPods | RefusalOf | QueueOf


def compute_wants(observed: Observed, plan: Plan, now: datetime, settings: RunSettings) -> Iterator[Want]:
    """What is to be read now."""
    pod = wants_log(observed, now, settings)
    if pod is not None:
        yield ProgressOf(pod)
    yield from (LastWordsOf(pod) for pod in plan.notes.words_of)
    job = wants_refusal(observed, now, settings)
    if job is not None:
        yield RefusalOf(job)
    job = wants_queue(observed, now, settings)
    if job is not None:
        yield QueueOf(job)
    starting = wants_events(observed, now, settings)
    if starting is not None:
        yield starting


def wants_log(observed: Observed, now: datetime, settings: RunSettings) -> PodView | None:
    """The pod whose log is to be read now: rank 0, from time to time while it runs and once when it has ended.

    No gang is called stalled before a last look. A preflight has no progress to tell.
    """
    pod = _rank_zero(observed)
    if pod is None or pod.gone or not (pod.running or pod.ended):
        return None
    if pod.ended is not None:
        return None if observed.reports.log_read_to_end else pod
    left = seconds_to_stall(observed.run, observed.reports, now)
    stalled = left is not None and left <= 0
    return pod if stalled or is_due(observed.reports.log_read_at, now, settings.log_interval) else None


def wants_refusal(observed: Observed, now: datetime, settings: RunSettings) -> JobView | None:
    """The Job whose Events are to be read now, because pods of it are missing.

    One that the Job controller has not come to yet has none, and in a burst of runs there are many.
    """
    job = observed.live_job()
    if job is None or job.suspended or job.started is None or not observed.is_short_of_pods(job):
        return None
    seen = observed.reports.seen
    late = is_due(seen.get(started_seen(job), now), now, REFUSAL_DELAY)
    return job if late and is_due(observed.reports.refusal_read_at, now, 3 * settings.log_interval) else None


def wants_events(observed: Observed, now: datetime, settings: RunSettings) -> EventsOfPods | None:
    """The pods whose Events are to be read now, because they have a node and do not start."""
    job = observed.live_job()
    if job is None or job.suspended:
        return None
    turns = {uid: turn for turn, uid in enumerate(observed.reports.pod_events)}
    pods = sorted(find_stuck(observed.gang(job)), key=lambda pod: turns.get(pod.uid, -1))[:ASKED_PODS]
    seen = observed.reports.seen
    late = bool(pods) and is_due(max(seen.get(starting_seen(pod), now) for pod in pods), now, POD_DELAY)
    due = is_due(observed.reports.pod_events_read_at, now, _events_interval(observed, job, settings))
    return EventsOfPods(job, tuple(pods)) if late and due else None


def _events_interval(observed: Observed, job: JobView, settings: RunSettings) -> float:
    """Seconds between two looks at Events: fewer while there are pods of which nobody knows why they do not start."""
    unread = any(pod.uid not in observed.reports.pod_events for pod in find_stuck(observed.gang(job)))
    return settings.log_interval if unread else 3 * settings.log_interval


def wants_queue(observed: Observed, now: datetime, settings: RunSettings) -> JobView | None:
    """The suspended Job of which Kueue is to be asked now: at once where it had pods, else when Kueue has had a moment.

    While Kueue has nothing new to say, it is asked more and more seldom.
    """
    job = observed.live_job()
    if job is None or not job.suspended:
        return None
    had_pods = any(map(is_stopping, [*observed.gang(job), *observed.stopping(job)]))
    due = is_due(observed.reports.queue_read_at, now, _queue_interval(observed, settings))
    return (
        job if due and (had_pods or is_due(observed.reports.seen.get(job_seen(job), now), now, REFUSAL_DELAY)) else None
    )


def _queue_interval(observed: Observed, settings: RunSettings) -> float:
    """Seconds between two questions: as long as the answer has been the same."""
    read, changed = observed.reports.queue_read_at, observed.reports.queue_changed_at
    same = (read - changed).total_seconds() if read and changed else 0.0
    return min(max(3 * settings.log_interval, same), QUEUE_INTERVAL)


def compute_next_look(observed: Observed, plan: Plan, settings: RunSettings) -> float | None:
    """Seconds until the run is to be looked at again without an event, or ``None``."""
    times = [] if plan.requeue_after is None else [plan.requeue_after]
    if plan.launch is not None:
        times.append(REFUSAL_DELAY)
    job = observed.live_job()
    if job is not None and not plan.ended:
        pod = _rank_zero(observed)
        if job.suspended:
            read = observed.reports.queue_read_at is not None
            times.append(_queue_interval(observed, settings) if read else REFUSAL_DELAY)
        elif pod is not None and pod.running:
            times.append(min(settings.log_interval, float(observed.run.spec.run_policy.stall_timeout_seconds)))
        elif job.started is not None and observed.is_short_of_pods(job):
            times.append(REFUSAL_DELAY if observed.reports.refusal_read_at is None else 3 * settings.log_interval)
        elif any(pod.is_starting for pod in observed.gang(job)):
            read = observed.reports.pod_events_read_at is not None
            times.append(_events_interval(observed, job, settings) if read else POD_DELAY)
        if any(find_unspoken(observed.gang(job), job)):
            times.append(QUIET)
    return min(times, default=None)


def _rank_zero(observed: Observed) -> PodView | None:
    job = observed.live_job()
    if job is None or job.preflight:
        return None
    return next((pod for pod in observed.gang(job) if pod.index == 0), None)
