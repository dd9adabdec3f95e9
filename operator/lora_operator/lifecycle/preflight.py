"""Before the first attempt: one pod without a GPU looks at everything that can be known beforehand. All pure.

    launch -> passed: pins and plan are put on record, and the first attempt follows
           -> failed: by the rules that attempts have, the next preflight follows, or the run has failed

Of the status only the number of preflights that failed and the condition PreflightPassed are read: the preflight that
counts is the one after those that failed.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from lora_api import RULES, ConditionType, Failure, FailureClass, Phase, Termination
from lora_operator.children.resources import gang_resources_on_cpu, preflight_resources
from lora_operator.diagnosis.diagnose import diagnose_pods, diagnose_root, termination_of
from lora_operator.diagnosis.firstseen import running_since
from lora_operator.diagnosis.obstacles import diagnose_obstacle, is_by_limit_range
from lora_operator.lifecycle.outcomes import PREFLIGHT, decide_failure, decide_lasting, decide_suspended
from lora_operator.lifecycle.queued import describe_queue
from lora_operator.policies.pause import seconds_to_retry
from lora_operator.settings import RunSettings
from lora_operator.state.facts import REFUSED_BY_LIMIT_RANGE, asks_as_the_gang, has_passed
from lora_operator.state.failures import new_failure
from lora_operator.state.observed import Observed
from lora_operator.state.plan import DeleteJob, EnqueueJob, LaunchPreflight, Mark, Plan
from lora_operator.state.workload import uses_kueue
from lora_operator.watched.views import JobView, PodView

_CHECKING = "A pod without a GPU checks the model, every record, the store and the memory plan"


def needs_preflight(observed: Observed, settings: RunSettings) -> bool:
    """Whether the first attempt has to wait for a preflight. One that was launched without is not held up."""
    status = observed.run.status
    return settings.preflight == "on" and not (status.attempt or observed.jobs or has_passed(status))


def decide_preflight(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    """What to do next about the preflight of a run that needs one."""
    number = observed.run.status.failed_preflights + 1
    suspended = observed.run.spec.run_policy.suspend
    for job in observed.preflights.values():
        if (job.preflight < number or suspended) and not job.deleting:
            return Plan(actions=(DeleteJob(job),))
    if suspended:
        return decide_suspended(observed)
    current = observed.preflights.get(number)
    if current is None:
        return _decide_launch(observed, number, now)
    return _decide_job(observed, current, now, settings)


def _decide_launch(observed: Observed, number: int, now: datetime) -> Plan:
    pause = seconds_to_retry(observed, now)
    if pause is not None:
        return Plan(requeue_after=pause)
    return _waiting("Preflight", _CHECKING, actions=(LaunchPreflight(number),))


def _decide_job(observed: Observed, job: JobView, now: datetime, settings: RunSettings) -> Plan:
    """Follows the preflight's Job: passed, failed, running, or on the way there."""
    pods = observed.gang(job)
    passed = _find_passed(pods)
    if passed is not None:
        mark = Mark(value=True, reason="PreflightPassed", message=passed.message)
        return Plan(
            phase=Phase.PREFLIGHT, reason="PreflightPassed", message=passed.message,
            conditions={ConditionType.PREFLIGHT_PASSED: mark}, passed=passed.preflight,
        )  # fmt: skip
    if job.deleting:
        return _waiting("Preflight", "The Job of the preflight was deleted; another one follows")
    seen = observed.reports.seen
    symptoms = diagnose_pods(pods, job, now, grace=settings.failure_grace, processes_per_node=0, seen=seen)
    if symptoms:
        failure = diagnose_root(symptoms, pods, PREFLIGHT, now, seen)
        waited = _time_waited(pods, job)
        return decide_failure(observed, PREFLIGHT, failure, now, settings, symptoms=symptoms, waited=waited)
    if job.suspended:
        return _decide_held(observed, job, settings)
    refused = _find_too_little(observed, job, now)
    if refused is not None:
        return decide_failure(observed, PREFLIGHT, refused, now, settings)
    obstacle = diagnose_obstacle(
        pods, job, observed.reports, now, limit=settings.start_timeout, patience=settings.preflight_timeout
    )
    if obstacle is not None:
        left = obstacle.seconds_left(now, settings.start_timeout)
        if left is not None and left <= 0:
            return decide_lasting(observed, PREFLIGHT, obstacle, now, settings)
        return _waiting(obstacle.reason, obstacle.text, requeue_after=left)
    if not any(pod.running for pod in pods):
        return _waiting("Preflight", _CHECKING)
    left = settings.preflight_timeout - (now - running_since(job, observed.reports.seen, now)).total_seconds()
    if left <= 0:
        return decide_failure(observed, PREFLIGHT, _overdue(pods[0], settings, now), now, settings)
    return _waiting("Preflight", _CHECKING, requeue_after=left)


def _time_waited(pods: list[PodView], job: JobView) -> timedelta:
    """How long the pod of ``job`` has waited for its node, by the clocks of the control plane alone."""
    got = max((pod.scheduled_at for pod in pods if pod.scheduled_at is not None), default=job.created)
    return max(timedelta(0), got - job.created)


def find_running_on(observed: Observed) -> JobView | None:
    """The Job of a preflight that has passed and whose pod runs on, by a sidecar, so that nobody ends it but us."""
    if not has_passed(observed.run.status):
        return None
    jobs = (job for job in observed.preflights.values() if not job.deleting)
    return next((job for job in jobs if any(pod.runs_on for pod in observed.gang(job))), None)


def _decide_held(observed: Observed, job: JobView, settings: RunSettings) -> Plan:
    """Kueue holds ``job`` back: it is set to take up Jobs that name no queue, or has one for them all.

    It lets none go that names no queue, so this one gets that of its run.
    """
    waiting = _waiting("Queued", describe_queue(job.name, observed.reports.queue))
    queued = uses_kueue(observed.run.spec.run_policy.queue_name, settings)
    return replace(waiting, actions=(EnqueueJob(job),)) if queued and not job.queue else waiting


def _waiting(
    reason: str, message: str, *, actions: tuple[LaunchPreflight, ...] = (), requeue_after: float | None = None
) -> Plan:
    return Plan(
        phase=Phase.PREFLIGHT,
        reason=reason,
        message=message,
        conditions={ConditionType.PREFLIGHT_PASSED: Mark(value=False, reason=reason, message=message)},
        actions=actions,
        requeue_after=requeue_after,
    )


def _find_passed(pods: list[PodView]) -> Termination | None:
    """The last words of a preflight that passed."""
    for pod in pods:
        termination = termination_of(pod)
        passed = pod.ended is not None and pod.ended.exit_code == 0
        if passed and termination is not None and termination.outcome == "succeeded" and termination.preflight:
            return termination
    return None


def _find_too_little(observed: Observed, job: JobView, now: datetime) -> Failure | None:
    """The end of a preflight that a LimitRange refuses, where it would not refuse what the gang asks for."""
    run, refusal = observed.run, observed.reports.refusal
    if refusal is None or not (observed.is_short_of_pods(job) and is_by_limit_range(refusal.message)):
        return None
    if asks_as_the_gang(run.status) or preflight_resources(run) == gang_resources_on_cpu(run):
        return None
    message = f"Pods of Job {job.name} are refused, which asks for less than the gang does: {refusal.message}"
    failure = new_failure(FailureClass.POD_LOST, PREFLIGHT, message, now, REFUSED_BY_LIMIT_RANGE)
    remedy = (
        "The next preflight asks for the CPU and memory that the gang asks for. To have it ask for less, set "
        "preflightResources of the ClusterLoRARuntime to what the LimitRange of the namespace allows."
    )
    return failure.model_copy(update={"remedy": remedy})


def _overdue(pod: PodView, settings: RunSettings, now: datetime) -> Failure:
    return Failure(
        attempt=PREFLIGHT,
        failure_class=FailureClass.STALLED,
        reason=str(FailureClass.STALLED),
        message=f"The preflight did not end within {settings.preflight_timeout:.0f} s",
        remedy=f"{RULES[FailureClass.STALLED].remedy} The time of a preflight is the operator's --preflight-timeout.",
        pod=pod.name,
        at=now,
    )
