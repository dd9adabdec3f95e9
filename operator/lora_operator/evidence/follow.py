"""What to read on top of the watches, and when: logs, Events, queues, objects that should be there. All pure."""

from datetime import datetime

from lora_operator.clock import is_due
from lora_operator.lifecycle.preflight import needs_preflight
from lora_operator.lifecycle.queued import is_stopping
from lora_operator.policies.stall import seconds_to_stall
from lora_operator.settings import Settings
from lora_operator.state.facts import is_finished, is_over
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.watched.views import JobView, PodView

REFUSAL_DELAY = 3.0
"""Seconds that the Job controller has to make a Job's pods before the operator asks why it does not."""

QUEUE_INTERVAL = 600.0
"""Longest time in seconds between two questions to Kueue about a run that waits."""


def missing_attempt(observed: Observed) -> int | None:
    """The attempt whose Job was made and is not there, though nothing says that the attempt has ended."""
    status = observed.run.status
    over = is_finished(status) or is_over(status, status.attempt)
    if observed.run.metadata.deletion_timestamp or over or not status.attempt or status.attempt in observed.jobs:
        return None
    return status.attempt


def lacks_preflight(observed: Observed, settings: Settings) -> bool:
    """Whether the preflight that counts is not there, though somebody has looked at the run before.

    It may have failed: the watch of runs, which tells so, may be later than that of Jobs, if another operator is there.
    """
    status = observed.run.status
    if observed.run.metadata.deletion_timestamp or is_finished(status) or not status.conditions:
        return False
    number = status.failed_preflights + 1
    return needs_preflight(observed, settings) and all(other > number for other in observed.preflights)


def unseen_ends(observed: Observed) -> JobView | None:
    """A Job without a verdict that has failed pods which nobody has seen end, or such a rank 0 that has succeeded.

    The watches of Jobs and of pods are apart, so news of a Job may come before those of its pods, most of all at start.
    A pod that is taken to be gone, or to be running, has no last words, and its gang would be judged without them.
    """
    job = observed.live_job()
    if job is None:
        return None
    heard = job.failed_indexes | (job.completed_indexes & {0})
    return None if heard <= {pod.index for pod in observed.gang(job) if pod.has_ended} else job


def wants_log(observed: Observed, now: datetime, settings: Settings) -> PodView | None:
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


def wants_refusal(observed: Observed, now: datetime, settings: Settings) -> JobView | None:
    """The Job whose Events are to be read now, because pods of it are missing.

    One that the Job controller has not come to yet has none, and in a burst of runs there are many.
    """
    job = observed.live_job()
    if job is None or job.suspended or job.started is None or not observed.is_short_of_pods(job):
        return None
    late = is_due(job.started, now, REFUSAL_DELAY)
    return job if late and is_due(observed.reports.refusal_read_at, now, 3 * settings.log_interval) else None


def forgotten_pods(observed: Observed) -> list[PodView]:
    """Pods that hold up the next attempt, and that nobody deletes though their Job is gone: they may be gone too."""
    run = observed.run
    if run.metadata.deletion_timestamp or is_finished(run.status):
        return []
    return [pod for pod in observed.leftovers() if pod.deleting_at is None]


def wants_queue(observed: Observed, now: datetime, settings: Settings) -> JobView | None:
    """The suspended Job of which Kueue is to be asked now: at once where it had pods, else when Kueue has had a moment.

    While Kueue has nothing new to say, it is asked more and more seldom.
    """
    job = observed.live_job()
    if job is None or not job.suspended:
        return None
    had_pods = any(map(is_stopping, [*observed.gang(job), *observed.stopping(job)]))
    due = is_due(observed.reports.queue_read_at, now, _queue_interval(observed, settings))
    return job if due and (had_pods or is_due(job.created, now, REFUSAL_DELAY)) else None


def _queue_interval(observed: Observed, settings: Settings) -> float:
    """Seconds between two questions: as long as the answer has been the same."""
    read, changed = observed.reports.queue_read_at, observed.reports.queue_changed_at
    same = (read - changed).total_seconds() if read and changed else 0.0
    return min(max(3 * settings.log_interval, same), QUEUE_INTERVAL)


def compute_next_look(observed: Observed, plan: Plan, settings: Settings) -> float | None:
    """Seconds until the run is to be looked at again without an event, or ``None``."""
    times = [] if plan.requeue_after is None else [plan.requeue_after]
    if plan.launch is not None or plan.launch_preflight is not None:
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
    return min(times, default=None)


def _rank_zero(observed: Observed) -> PodView | None:
    job = observed.live_job()
    if job is None or job.preflight:
        return None
    return next((pod for pod in observed.gang(job) if pod.index == 0), None)
