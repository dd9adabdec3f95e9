"""Runs that wait in a queue, and gangs whose quota the queue takes back. All pure.

A Job that names a queue is created suspended, and from then on Kueue alone writes ``spec.suspend``: it lets the Job go
once there is quota, and suspends it again to give the quota to another workload. The Job controller then deletes the
pods without counting how they end (they get SIGTERM, and save a checkpoint), and makes new ones once the Job is let go
again. So the attempt goes on, its Job keeps its place in the queue, and nothing is a failure.

Only where an index has ended by itself before it could be deleted does the Job not run it again. Then the gang would
never be whole, and the attempt ends: the Job of the next one is queued.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from lora_api import ConditionType, Failure, FailureClass, Phase
from lora_operator.diagnosis.diagnose import seconds_to_lost
from lora_operator.diagnosis.firstseen import suspended_seen
from lora_operator.state.failures import new_failure
from lora_operator.state.plan import LaunchAttempt, Mark, Plan
from lora_operator.state.reports import Reports
from lora_operator.state.workload import QueueReport
from lora_operator.watched.views import JobView, PodView
from lora_operator.wording import with_remedy

_INADMISSIBLE = "Inadmissible"
_PATIENCE = 5.0
"""Seconds after which is said that quota was taken back, though nobody could read why."""

_NO_KUEUE_REMEDY = (
    "Install Kueue and make the LocalQueue in this namespace; or delete this LoRAFineTune and create it again without "
    "runPolicy.queueName."
)
_NO_WORKLOAD_REMEDY = (
    "See kubectl describe job, and that Kueue runs, manages this namespace and knows the priority class of the run."
)
_NO_QUEUE_REMEDY = (
    "Set queueName in the ClusterLoRARuntime, or create the run again with runPolicy.queueName. kubectl label job "
    "{job} kueue.x-k8s.io/queue-name=NAME puts this one into the LocalQueue NAME."
)
_DEACTIVATED_REMEDY = "Set spec.active of the Workload to true to let the run go on."
_INADMISSIBLE_REMEDY = (
    "See kubectl describe localqueue: it has to exist in this namespace under the name in runPolicy.queueName, and its "
    "ClusterQueue has to be active."
)


def broken_gang(job: JobView, now: datetime) -> Failure:
    """The end of an attempt whose Job was suspended when some of its pods had done their work, and others had not."""
    message = f"Job {job.name} was suspended while its last pods were ending"
    return new_failure(FailureClass.EVICTED, job.attempt, message, now, "JobSuspended")


def decide_queued(job: JobView, pods: Sequence[PodView], reports: Reports, now: datetime, grace: float) -> Plan:
    """What to say of a Job that is suspended: it waits for quota, or its ``pods`` have to end first.

    Why the quota was taken back is said once, in Kueue's words: they are read before anything is said.
    """
    report = reports.queue
    if not any(is_stopping(pod) for pod in pods):
        return plan_queued(job.attempt, describe_queue(job.name, report))
    left = _PATIENCE - (now - reports.seen.get(suspended_seen(job), now)).total_seconds()
    if report is None and left > 0:
        return Plan(requeue_after=left)
    reason, words = "JobSuspended", "The Job was suspended by whoever manages its queue"
    if report is not None and report.evicted:
        reason, words = report.evicted, f"Kueue took the quota back: {report.evicted_message}".rstrip(". :")
    message = f"{words}. The pods save a checkpoint and end; the run is queued again"
    plan = plan_queued(job.attempt, message, reason=reason)
    return replace(plan, requeue_after=seconds_to_lost(pods, now, grace, reports.seen))


def is_stopping(pod: PodView) -> bool:
    """Whether a pod of a suspended Job has to end. A new one has not: that its Job was let go is only not known yet."""
    return not pod.has_ended and (pod.running or pod.deleting_at is not None)


def plan_queued(attempt: int, message: str, *, reason: str = "Queued", actions: tuple[LaunchAttempt, ...] = ()) -> Plan:
    """``attempt`` waits in a queue, for the reason in ``message``."""
    mark = Mark(value=False, reason=reason, message=message)
    return Plan(
        phase=Phase.QUEUED, reason=reason, message=message, attempt=attempt, actions=actions,
        conditions={ConditionType.SCHEDULED: mark, ConditionType.RUNNING: mark},
    )  # fmt: skip


def describe_queue(job: str, report: QueueReport | None) -> str:
    """Why ``job`` waits, in Kueue's words, and what to do where waiting alone does not help."""
    if report is None:
        return "Waiting for the queue to let the run go"
    if not report.installed:
        return with_remedy(f"Nobody has taken up Job {job}: this cluster has no Kueue", _NO_KUEUE_REMEDY)
    if not report.workload:
        return with_remedy(f"Kueue has made no Workload for Job {job}", _NO_WORKLOAD_REMEDY)
    if report.deactivated:
        return with_remedy(f"Workload {report.workload}: {report.evicted_message}", _DEACTIVATED_REMEDY)
    if not report.queue:
        text = f"Kueue holds Job {job} back, which names no queue (its manageJobsWithoutQueueName is on)"
        return with_remedy(text, _NO_QUEUE_REMEDY.format(job=job))
    number = "Waiting" if report.position is None else f"Number {report.position}"
    text = f"{number} in queue {report.queue}: {report.message or 'Kueue has not looked at it yet'}"
    return with_remedy(text, _INADMISSIBLE_REMEDY) if report.reason == _INADMISSIBLE else text
