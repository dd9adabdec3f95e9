"""After the end: pods that run on are ended, and after a while all that the run was made of is deleted. Pure."""

from dataclasses import replace
from datetime import datetime

from lora_api import ConditionType, Phase
from lora_operator.lifecycle.orphans import seconds_to_letting_go
from lora_operator.names import child_name, preflight_name, service_name
from lora_operator.policies.ttl import seconds_to_cleanup
from lora_operator.settings import RunSettings
from lora_operator.state.facts import has_passed, holds
from lora_operator.state.observed import Observed, seconds_to_leaving
from lora_operator.state.plan import NOTHING, DeleteChildren, DeleteJob, DeleteRun, Mark, Plan, StopJob
from lora_operator.status.claims import disown


def decide_finished(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    """What to do about a run that has ended for good.

    Of its status only two things are still decided: CleanedUp, and whose the adapter is, since a status may have been
    restored, or written by hand, with that of another run.
    """
    left = seconds_to_cleanup(observed, now)
    if left is not None and left <= 0:
        return _decide_ending(observed, now, settings) or _disown(observed, _decide_cleanup(observed))
    plan = _disown(observed, _decide_running_on(observed, now, settings))
    return plan if left is None else replace(plan, requeue_after=min(left, plan.requeue_after or left))


def decide_retry(observed: Observed) -> Plan | None:
    """Takes back the end of a run that failed, once runPolicy.retry was raised; ``None``: there is no need.

    The attempt that failed has its verdict, so what follows is what follows any failed attempt: the next one, or the
    next preflight. A run for which nothing was made yet looks at its runtime again.
    """
    run, status = observed.run, observed.run.status
    wanted = run.spec.run_policy.retry or 0
    if not holds(status, ConditionType.FAILED) or wanted <= (status.observed_retry or 0):
        return None
    afresh = not status.attempt and status.trainer is None and not observed.all_jobs()
    message = f"runPolicy.retry was raised to {wanted}: the run is tried again"
    mark = Mark(value=False, reason="Retried", message=message)
    return Plan(
        phase=Phase.RESTARTING if status.attempt else Phase.PENDING,
        reason="Retried",
        message=message,
        attempt=status.attempt,
        conditions={kind: mark for kind in (ConditionType.FAILED, ConditionType.CLEANED_UP) if holds(status, kind)},
        retry=wanted,
        afresh=afresh,
        requeue_after=0.0,
    )


def _disown(observed: Observed, plan: Plan) -> Plan:
    """``plan``, which also says so where the adapter in the status is another run's.

    The adapter itself stays in the status: a field that somebody else has applied is not the operator's to take away.
    """
    adapter = observed.run.status.adapter
    marks = disown(observed.run, adapter) if adapter is not None else {}
    return replace(plan, conditions={**plan.conditions, **marks})


def list_children(observed: Observed, settings: RunSettings) -> list[tuple[str, str]]:
    """Resource and name of all that the operator may have made for a run, but for its Jobs, which are watched.

    There may be children of one more preflight and one more attempt than the status tells of: an operator can end
    after it made them, and before it wrote so. Earlier releases made a ConfigMap for each Job, and a Service for each
    attempt. The NetworkPolicy comes last, and also where none is made any more: one may be left from before.
    """
    run, status = observed.run.metadata.name, observed.run.status
    passed = 1 if has_passed(status) else 0
    numbers = {*range(1, status.failed_preflights + passed + 2), *observed.preflights}
    preflights = [preflight_name(run, number) for number in sorted(numbers)]
    attempts = [child_name(run, attempt) for attempt in range(1, status.attempt + 2)]
    kinds = ["configmaps", "services"]
    if settings.gang_scheduler != "none":
        kinds.append(f"podgroups.{settings.gang_scheduler}")
    return [
        *(("configmaps", name) for name in preflights),
        *((kind, name) for kind in kinds for name in attempts),
        ("services", service_name(run)),
        ("networkpolicies", run),
    ]


def _decide_ending(observed: Observed, now: datetime, settings: RunSettings) -> Plan | None:
    """Ends pods that still run before the rest goes: without the NetworkPolicy they could speak to anybody."""
    orphans, job = observed.orphans(), observed.current_job()
    alive = [pod for pod in observed.pods if pod.job_uid and pod.holds_node and pod not in orphans]
    if alive and job is not None and not job.deleting:
        return Plan(actions=(DeleteJob(job),))
    waits = [
        seconds_to_leaving(alive, now, settings.failure_grace, observed.reports.seen),
        seconds_to_letting_go(observed, now, settings),
    ]
    wait = min((seconds for seconds in waits if seconds is not None), default=None)
    return None if wait is None else Plan(requeue_after=wait)


def _decide_cleanup(observed: Observed) -> Plan:
    """Deletes what is left, and puts on record that it did: nothing of it but Jobs and pods is watched.

    Some may be left where no Job is: one that has no log worth keeping goes at the end, and people delete Jobs too.
    """
    policy = observed.run.spec.run_policy
    if policy.ttl_deletes == "run":
        return Plan(actions=(DeleteRun(),))
    if holds(observed.run.status, ConditionType.CLEANED_UP) and not observed.all_jobs():
        return NOTHING
    message = (
        f"ttlSecondsAfterFinished ({policy.ttl_seconds_after_finished} s) is over: "
        "pods and their logs, Jobs, the Service and the NetworkPolicy were deleted"
    )
    mark = Mark(value=True, reason="TimeToLiveOver", message=message)
    return Plan(actions=(DeleteChildren(),), conditions={ConditionType.CLEANED_UP: mark})


def _decide_running_on(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    """Ends pods that run on after the end of their run, by a sidecar perhaps; the others are kept for their logs.

    A Job with a failed index is ended by lowering maxFailedIndexes, which leaves its ended pods alone. Another one has
    no log worth keeping and is deleted.
    """
    job = observed.current_job()
    ended_at = observed.run.status.completion_time
    if job is None or job.deleting or job.stopping or job.finished:
        return NOTHING
    alive, short = [pod for pod in observed.gang(job) if pod.holds_node], observed.is_short_of_pods(job)
    if not alive and not short:
        return NOTHING
    left = settings.failure_grace - (now - ended_at).total_seconds() if ended_at else 0.0
    succeeded = observed.run.status.adapter is not None
    end_by_themselves = not short and all(pod.has_ended and not pod.runs_on for pod in alive)
    if left > 0 and (succeeded or end_by_themselves):
        return Plan(requeue_after=left)
    if job.failed_indexes:
        return Plan(actions=(StopJob(job),))
    return Plan(actions=(DeleteJob(job),))
