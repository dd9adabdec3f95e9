"""After the end: pods that run on are ended, and after a while all that the run was made of is deleted. Pure."""

from dataclasses import replace
from datetime import datetime, timedelta

from lora_operator.observed import Observed
from lora_operator.plan import NOTHING, Plan
from lora_operator.settings import Settings


def decide_finished(observed: Observed, now: datetime, settings: Settings) -> Plan:
    """What to do about a run that has ended for good. Its status is not written any more."""
    left = seconds_to_cleanup(observed, now)
    if left is not None and left <= 0:
        if observed.run.spec.run_policy.ttl_deletes == "run":
            return Plan(delete_run=True)
        return Plan(clean_up=True) if observed.all_jobs() else NOTHING
    plan = _decide_running_on(observed, now, settings)
    if left is None or not (observed.all_jobs() or observed.run.spec.run_policy.ttl_deletes == "run"):
        return plan
    return replace(plan, requeue_after=min(left, plan.requeue_after or left))


def seconds_to_cleanup(observed: Observed, now: datetime) -> float | None:
    """Seconds until runPolicy.ttlSecondsAfterFinished has passed; ``None`` without one."""
    ttl, ended_at = observed.run.spec.run_policy.ttl_seconds_after_finished, observed.run.status.completion_time
    if ttl is None or ended_at is None:
        return None
    return (ended_at + timedelta(seconds=ttl) - now).total_seconds()


def _decide_running_on(observed: Observed, now: datetime, settings: Settings) -> Plan:
    """Ends pods that run on after the end of their run; the others are kept for their logs.

    A Job with a failed index is ended by lowering maxFailedIndexes, which leaves its ended pods alone. Another one has
    no log worth keeping and is deleted.
    """
    job = observed.current_job()
    ended_at = observed.run.status.completion_time
    if job is None or job.deleting or job.stopping or job.finished:
        return NOTHING
    if all(pod.has_ended for pod in observed.gang(job)) and not observed.is_short_of_pods(job):
        return NOTHING
    left = settings.failure_grace - (now - ended_at).total_seconds() if ended_at else 0.0
    succeeded = observed.run.status.adapter is not None
    if succeeded and left > 0:
        return Plan(requeue_after=left)
    if job.failed_indexes:
        return Plan(stop=job)
    return Plan(delete=job)
