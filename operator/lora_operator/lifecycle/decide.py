r"""The state machine of a run: ``decide(observed, now, settings) -> Plan``. No IO and no clock.

The state is derived from what exists. Of the status only facts are read that cannot be derived again: the attempt,
the failures so far, the restarts used up, the time that the gang has run, what was suspended, and the terminal
condition, which is sticky.

    preflight -> launch -> [queued] -> wait for pods -> run -> succeed
                 |              |
                 +--- fail -----+--> record -> end the Job -> wait for its pods -> launch the next attempt
                 +--- suspend --/                             \-> while suspended: wait
                                 \-> record as final -> end the pods that still run, keep the others for their logs
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from lora_api import ConditionType, Phase
from lora_operator.diagnosis.diagnose import diagnose_root, seconds_to_lost
from lora_operator.diagnosis.firstseen import LEFTOVERS
from lora_operator.diagnosis.obstacles import diagnose_obstacle
from lora_operator.lifecycle.cleanup import decide_finished, decide_retry
from lora_operator.lifecycle.failing import Failing, find_failing
from lora_operator.lifecycle.orphans import (
    are_to_be_named,
    find_published,
    name_orphans,
    plan_orphans,
    published_adapter,
    seconds_to_letting_go,
)
from lora_operator.lifecycle.outcomes import (
    decide_failure,
    decide_lasting,
    decide_success,
    decide_suspended,
    decide_wait,
    job_lost,
    scheduled_mark,
)
from lora_operator.lifecycle.preflight import decide_preflight, find_running_on, needs_preflight
from lora_operator.lifecycle.queued import broken_gang, decide_queued, describe_queue, plan_queued
from lora_operator.lifecycle.refusals import DELETE_JOBS
from lora_operator.lifecycle.runtime import decide_runtime
from lora_operator.policies.deadline import find_overrun, seconds_to_deadline
from lora_operator.policies.pause import seconds_to_retry
from lora_operator.policies.placement import (
    explain_by_room,
    is_short_of_room,
    may_need_avoided,
    not_placed,
    seconds_to_giving_back,
    time_waited,
    waits_since,
)
from lora_operator.policies.stall import find_stall, seconds_to_stall
from lora_operator.settings import RunSettings
from lora_operator.state.facts import is_finished, is_over
from lora_operator.state.observed import Observed, seconds_to_leaving
from lora_operator.state.plan import NOTHING, DeleteJob, LaunchAttempt, Mark, Notes, Plan
from lora_operator.state.workload import uses_kueue
from lora_operator.status.claims import disown
from lora_operator.watched.views import JobView, PodView
from lora_operator.wording import name_pods, with_remedy

_BRIEF = 5.0
"""Seconds that the pods of an attempt which is over may take to end before they are told of."""


def decide(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    """What to do next."""
    return name_orphans(observed, _decide(observed, now, settings))


def _decide(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    status = observed.run.status
    if observed.run.metadata.deletion_timestamp:
        return NOTHING
    if is_finished(status):
        return decide_retry(observed) or decide_finished(observed, now, settings)
    unsettled = decide_runtime(observed, now, settings)
    if unsettled is not None:
        return unsettled
    if needs_preflight(observed, settings):
        return decide_preflight(observed, now, settings)
    running_on = find_running_on(observed)
    if running_on is not None:
        return Plan(actions=(DeleteJob(running_on),))
    published = find_published(observed)
    if published is not None:
        attempt, adapter = published
        return decide_success(attempt, adapter, disown(observed.run, adapter))
    attempt = max(status.attempt, 1)
    if is_over(status, attempt):
        if attempt + 1 not in observed.jobs:
            return _decide_replacement(observed, attempt, now, settings)
        attempt += 1
    job = observed.jobs.get(attempt)
    if job is not None:
        return _clear_away(observed, job, _decide_attempt(observed, job, now, settings))
    if status.attempt == attempt:
        return _decide_lost(observed, attempt, now, settings)
    return _decide_launch(observed, attempt, now, settings)


def _decide_launch(observed: Observed, attempt: int, now: datetime, settings: RunSettings) -> Plan:
    """Creates the children of ``attempt``, once the pods of earlier Jobs are gone: they hold GPUs and names."""
    if observed.run.spec.run_policy.suspend:
        return decide_suspended(observed)
    overrun = find_overrun(observed.run, max(attempt - 1, 1), now)
    if overrun is not None:
        return decide_failure(observed, overrun.attempt, overrun, now, settings)
    waiting = _wait_for_leftovers(observed, now, settings)
    if waiting is not None:
        return waiting
    pause = seconds_to_retry(observed, now)
    if pause is not None:
        return Plan(requeue_after=pause)
    if uses_kueue(observed.run.spec.run_policy.queue_name, settings):
        return plan_queued(attempt, describe_queue("", None), actions=(LaunchAttempt(attempt),))
    return replace(_plan_start(attempt, scheduled=False), actions=(LaunchAttempt(attempt),))


def _plan_start(attempt: int, *, scheduled: bool) -> Plan:
    """The pods of ``attempt`` are to start. The same before and after they are seen: any change would be a write."""
    phase = Phase.RESTARTING if attempt > 1 else Phase.STARTING
    return Plan(
        phase=phase,
        reason=str(phase),
        message="Waiting for the pods to start",
        attempt=attempt,
        conditions={
            ConditionType.SCHEDULED: scheduled_mark(value=scheduled),
            ConditionType.RUNNING: Mark(value=False, reason=str(phase), message="The pods do not run yet"),
        },
    )


def _decide_suspension(job: JobView) -> Plan:
    """Puts on record that ``job`` is ended by the user's wish, so that its end counts as no failure."""
    message = "The pods are asked to save a checkpoint and end"
    return Plan(
        phase=Phase.SUSPENDED,
        reason="Suspending",
        message=message,
        attempt=job.attempt,
        suspended=job.attempt,
        conditions={ConditionType.RUNNING: Mark(value=False, reason="Suspending", message=message)},
    )


def _decide_replacement(observed: Observed, attempt: int, now: datetime, settings: RunSettings) -> Plan:
    """Ends what is left of an attempt that is over, then launches the next one.

    A Job that may not be deleted does not hold that up, once nothing of it runs and nothing more of it will.
    """
    job = observed.jobs.get(attempt)
    if job is not None and not (DELETE_JOBS in observed.reports.denied and _is_done(observed, job)):
        return NOTHING if job.deleting else Plan(actions=(DeleteJob(job),))
    return _decide_launch(observed, attempt + 1, now, settings)


def _is_done(observed: Observed, job: JobView) -> bool:
    """Whether no pod of ``job`` holds a node, and none is to come."""
    held = any(pod.holds_node for pod in observed.pods if pod.job_uid == job.uid)
    return not held and (job.finished or not observed.is_short_of_pods(job))


def _clear_away(observed: Observed, job: JobView, plan: Plan) -> Plan:
    """``plan`` for ``job``, which also deletes Jobs before it that could not be deleted in time."""
    old = tuple(DeleteJob(one) for one in observed.jobs.values() if one.attempt < job.attempt and not one.deleting)
    return plan if plan.is_verdict else replace(plan, actions=(*plan.actions, *old))


def _wait_for_leftovers(observed: Observed, now: datetime, settings: RunSettings) -> Plan | None:
    """Waits for the pods of Jobs that are gone, but not for one that the kubelet had to have ended long ago.

    Nor for ever for one that nobody ends.
    """
    left, orphans = seconds_to_letting_go(observed, now, settings), observed.orphans()
    leaving = [pod for pod in observed.leftovers() if pod not in orphans]
    waits = [seconds_to_leaving(leaving, now, settings.failure_grace, observed.reports.seen), left]
    wait = max((seconds for seconds in waits if seconds is not None), default=None)
    if wait is None:
        return None
    if left is not None and are_to_be_named(observed, now, settings):
        return plan_orphans(observed, settings, left)
    if orphans and left is not None:
        wait = min(wait, settings.failure_grace)
    if observed.run.status.attempt > 0:
        return _tell_leaving(observed, leaving, wait, now)
    return decide_wait("WaitingForPodsToEnd", "Waiting for the pods of an earlier run of this name", wait)


def _tell_leaving(observed: Observed, leaving: list[PodView], wait: float, now: datetime) -> Plan:
    """Which pods the next attempt waits for, behind why it is needed, once that takes longer than it mostly does."""
    status = observed.run.status
    left = _BRIEF - (now - observed.reports.seen.get(LEFTOVERS, now)).total_seconds()
    if left > 0 or not leaving:
        return Plan(requeue_after=min(wait, left) if leaving else wait)
    failure = next((one for one in status.failures if one.attempt == status.attempt), None)
    reason = str(failure.failure_class) if failure else "WaitingForPodsToEnd"
    message = f"The next attempt waits for {name_pods([pod.name for pod in leaving])} to end"
    if failure:
        message = with_remedy(f"{failure.message.rstrip('.')}. {message}", failure.remedy)
    return Plan(
        phase=Phase.RESTARTING,
        reason=reason,
        message=message,
        attempt=status.attempt,
        conditions={ConditionType.RUNNING: Mark(value=False, reason=reason, message=message)},
        requeue_after=wait,
    )


def _decide_attempt(observed: Observed, job: JobView, now: datetime, settings: RunSettings) -> Plan:
    """Follows a Job: succeeded, failed, running, or on the way there."""
    pods = observed.gang(job)
    adapter = published_adapter(pods)
    if adapter is not None:
        return decide_success(job.attempt, adapter, disown(observed.run, adapter))
    if job.deleting:
        return _decide_lost(observed, job.attempt, now, settings)
    stopping = observed.stopping(job)
    failing = find_failing(observed, job, now, settings)
    if failing is not None:
        return _decide_failing(observed, job, failing, now, settings)
    if observed.run.spec.run_policy.suspend:
        return _decide_suspension(job)
    if job.suspended and job.completed_indexes:
        return decide_failure(observed, job.attempt, broken_gang(job, now), now, settings)
    if job.suspended:
        return decide_queued(job, [*pods, *stopping], observed.reports, now, settings.failure_grace)
    since = waits_since(observed, job.attempt, job.created, settings.restart_backoff)
    return replace(_decide_healthy(observed, job, pods, now, settings), waiting_since=since)


def _decide_lost(observed: Observed, attempt: int, now: datetime, settings: RunSettings) -> Plan:
    """Somebody has deleted the Job of ``attempt``."""
    waited = time_waited(observed, attempt, now, settings.restart_backoff)
    return decide_failure(observed, attempt, job_lost(attempt, now), now, settings, waited=waited)


def _decide_failing(observed: Observed, job: JobView, failing: Failing, now: datetime, settings: RunSettings) -> Plan:
    """Gives the peers of a failed pod a moment for their own last words, then ends the attempt."""
    if failing.is_heard:
        pods, symptoms = observed.gang(job), failing.symptoms
        failure = diagnose_root(symptoms, failing.pods, job.attempt, now, observed.reports.seen)
        incomplete = failing.failed_beside_late_pods or observed.is_short_of_pods(job)
        if incomplete:
            failure = explain_by_room(failure, observed, job, pods, now)
        return decide_failure(
            observed, job.attempt, failure, now, settings, symptoms=symptoms, incomplete=incomplete,
            waited=time_waited(observed, job.attempt, now, settings.restart_backoff),
            forgets_nodes=may_need_avoided(pods),
        )  # fmt: skip
    message = f"{failing.symptoms[0].message.rstrip('.')}. Waiting {failing.describe_wait()}"
    return Plan(
        phase=Phase.RUNNING,
        reason="PodFailed",
        message=message,
        attempt=job.attempt,
        conditions={ConditionType.RUNNING: Mark(value=False, reason="PodFailed", message=message)},
        notes=Notes(failing=True),
        requeue_after=failing.left,
    )


def _decide_healthy(
    observed: Observed, job: JobView, pods: list[PodView], now: datetime, settings: RunSettings
) -> Plan:
    nodes = observed.run.spec.parallelism.nodes
    scheduled = len(pods) == nodes and all(pod.scheduled for pod in pods)
    if len(pods) == nodes and all(pod.running or pod.has_ended for pod in pods):
        running = Mark(value=True, reason="PodsRunning", message="Every pod of the gang runs")
        marks = {ConditionType.SCHEDULED: scheduled_mark(value=True), ConditionType.RUNNING: running}
        return _decide_running(observed, job, marks, pods, settings, now)
    obstacle = diagnose_obstacle(
        pods, job, observed.reports, now, limit=settings.start_timeout, patience=settings.preflight_timeout
    )
    left = obstacle.seconds_left(now, settings.start_timeout) if obstacle is not None else None
    if obstacle is not None and left is not None and left <= 0:
        return decide_lasting(observed, job.attempt, obstacle, now, settings)
    short = is_short_of_room(observed, job, pods, now)
    back = seconds_to_giving_back(observed, now) if short else None
    if back is not None and back <= 0:
        failure = not_placed(observed, job, pods, now)
        forgets = may_need_avoided(pods)
        return decide_failure(observed, job.attempt, failure, now, settings, forgets_nodes=forgets)
    start = replace(_plan_start(job.attempt, scheduled=scheduled), notes=Notes(short_of_room=short))
    if obstacle is None:
        lost = seconds_to_lost(observed.stopping(job), now, settings.failure_grace, observed.reports.seen)
        return replace(start, requeue_after=_earliest(lost, back))
    mark = Mark(value=False, reason=obstacle.reason, message=obstacle.text)
    marks = {**start.conditions, ConditionType.RUNNING: mark}
    if obstacle.scheduling:
        marks[ConditionType.SCHEDULED] = mark
    return replace(
        start,
        reason=obstacle.reason,
        message=obstacle.text,
        conditions=marks,
        requeue_after=_earliest(left, back),
    )


def _earliest(*waits: float | None) -> float | None:
    return min((seconds for seconds in waits if seconds is not None), default=None)


_STAGE_REASONS = {
    "loading": "LoadingModel",
    "evaluating": "Evaluating",
    "training": "Training",
    "checkpointing": "Checkpointing",
    "publishing": "Publishing",
    "done": "Publishing",
}


def _decide_running(
    observed: Observed,
    job: JobView,
    marks: Mapping[ConditionType, Mark],
    pods: list[PodView],
    settings: RunSettings,
    now: datetime,
) -> Plan:
    run, reports = observed.run, observed.reports
    overdue = find_overrun(run, job.attempt, now) or find_stall(run, reports, job.attempt, now)
    if overdue is not None:
        return decide_failure(observed, job.attempt, overdue, now, settings)
    reason = _STAGE_REASONS.get(reports.stage, "Running")
    stall = seconds_to_stall(run, reports, now)
    waits = [
        seconds_to_lost(pods, now, settings.failure_grace, reports.seen),
        seconds_to_deadline(run, now),
        None if stall is None else max(1.0, stall),  # it may be overdue, and its log is read once more
    ]
    return Plan(
        phase=Phase.PUBLISHING if reason == "Publishing" else Phase.RUNNING,
        reason=reason,
        message="The gang is training",
        attempt=job.attempt,
        conditions=marks,
        requeue_after=_earliest(*waits),
    )
