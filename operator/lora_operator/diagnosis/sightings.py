"""What there is to be seen of a run for the first time (``firstseen`` says why). All pure."""

from dataclasses import replace
from datetime import datetime

from lora_operator.diagnosis.firstseen import (
    LEFTOVERS,
    ORPHANS,
    could_run_since,
    end_seen,
    held_up_seen,
    job_seen,
    retry_seen,
    run_seen,
    started_seen,
    starting_seen,
    suspended_seen,
    warned_seen,
)
from lora_operator.diagnosis.obstacles import find_held_up
from lora_operator.diagnosis.silence import find_unspoken
from lora_operator.diagnosis.stuck import find_stuck, find_warned
from lora_operator.state.observed import Observed, stop_seen
from lora_operator.state.reports import Reports


def note_sightings(observed: Observed, now: datetime) -> Reports:
    """The reports of ``observed`` with the time of what is seen for the first time, and without what is so no more."""
    old = observed.reports.seen
    new = {what: old.get(what, since) for what, since in _find(observed, now).items()}
    return observed.reports if new == old else replace(observed.reports, seen=new)


def note_job(observed: Observed, reports: Reports, now: datetime) -> Reports:
    """``reports`` with the sighting of the Job alone, whose pods are of no interest."""
    job = observed.live_job()
    if job is None or job_seen(job) in reports.seen:
        return reports
    return replace(reports, seen={**reports.seen, job_seen(job): now})


def _find(observed: Observed, now: datetime) -> dict[str, datetime]:
    found = {ORPHANS: now} if observed.orphans() else {}
    if any(pod.deleting_at for pod in observed.leftovers()):
        found[LEFTOVERS] = now
    found |= {stop_seen(pod): now for pod in observed.pods if pod.deleting_at is not None}
    if observed.run.status.retry_time is not None:
        found[retry_seen(observed.run.status.retry_time)] = now
    job = observed.live_job()
    if job is None:
        return found
    pods = observed.gang(job)
    found[job_seen(job)] = now
    if job.started is not None:
        found[started_seen(job)] = now
    if job.suspended:
        found[suspended_seen(job)] = now
    found |= {end_seen(pod): now for pod in pods if pod.has_ended}
    found |= {held_up_seen(pod, kind): now for kind, pod in find_held_up(pods)}
    found |= dict.fromkeys(find_unspoken(pods, job), now)
    found |= {starting_seen(pod): now for pod in find_stuck(pods)}
    found |= {warned_seen(pod): now for pod in find_warned(pods, observed.reports)}
    runs = next((pod for pod in pods if pod.running), None)
    if job.preflight and runs is not None:
        first_look = job_seen(job) not in observed.reports.seen
        found[run_seen(job)] = could_run_since(job, runs, now) if first_look else now
    return found
