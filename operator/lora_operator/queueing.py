"""Runs that wait in a queue, and gangs whose quota the queue takes back. All pure.

A Job that names a queue is created suspended, and from then on Kueue alone writes ``spec.suspend``: it lets the Job go
once there is quota, and suspends it again to give the quota to another workload. Pods of a suspended Job get SIGTERM,
save a checkpoint and end with an exit code other than 0, so their indexes have failed, and the same Job cannot go on.
Therefore a suspension ends the attempt, and the Job of the next attempt is queued.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnose import Symptom, seconds_to_lost, with_remedy
from lora_operator.plan import Mark, Plan
from lora_operator.settings import Settings
from lora_operator.views import JobView, PodView

_PREEMPTED = "Preempted"
_DEACTIVATED = "Deactivated"
_OTHER = "JobSuspended"
_INADMISSIBLE = "Inadmissible"

_NO_KUEUE_REMEDY = (
    "Install Kueue and make the LocalQueue in this namespace; or delete this LoRAFineTune and create it again without "
    "runPolicy.queueName."
)
_NO_WORKLOAD_REMEDY = (
    "See kubectl describe job, and that Kueue runs, manages this namespace and knows the priority class of the run."
)
_DEACTIVATED_REMEDY = "Set spec.active of the Workload to true to let the run go on."
_INADMISSIBLE_REMEDY = (
    "See kubectl describe localqueue: it has to exist in this namespace under the name in runPolicy.queueName, and its "
    "ClusterQueue has to be active."
)


@dataclass(frozen=True)
class QueueReport:
    """What Kueue says of a suspended Job.

    ``installed`` False: the cluster does not know Kueue. ``workload`` empty: Kueue has no Workload for the Job.
    ``position`` counts from 1 in the ClusterQueue, over all namespaces. ``evicted`` is why the quota was taken back.
    """

    installed: bool = True
    workload: str = ""
    queue: str = ""
    reserved: bool = False
    reason: str = ""
    message: str = ""
    evicted: str = ""
    evicted_message: str = ""
    position: int | None = None

    @property
    def pending(self) -> bool:
        """The Workload waits for quota, so that it has a place in a queue."""
        return bool(self.queue) and not self.reserved and not self.deactivated

    @property
    def deactivated(self) -> bool:
        """The Workload was switched off: it is not queued again until somebody switches it on."""
        return self.evicted.startswith(_DEACTIVATED)


def parse_workload(raw: Mapping[str, Any]) -> QueueReport:
    """What a Workload of Kueue says: why it waits, in the words of the condition that is not fulfilled."""
    conditions = {item["type"]: item for item in (raw.get("status") or {}).get("conditions") or ()}
    reserved, admitted = conditions.get("QuotaReserved", {}), conditions.get("Admitted", {})
    evicted = conditions.get("Evicted", {})
    has_quota = reserved.get("status") == "True"
    waits = admitted if has_quota else reserved
    was_evicted = evicted.get("status") == "True"
    return QueueReport(
        workload=raw["metadata"]["name"],
        queue=(raw.get("spec") or {}).get("queueName") or "",
        reserved=has_quota,
        reason=waits.get("reason", ""),
        message=waits.get("message", ""),
        evicted=evicted.get("reason", "") if was_evicted else "",
        evicted_message=evicted.get("message", "") if was_evicted else "",
    )


def find_position(pending: Iterable[Mapping[str, Any]], workload: str) -> int | None:
    """The number of ``workload`` in its ClusterQueue, counted from 1, in the list of Kueue's visibility API."""
    for item in pending:
        if item["metadata"]["name"] == workload:
            return int(item.get("positionInClusterQueue") or 0) + 1
    return None


def blame_queue(symptoms: Sequence[Symptom], report: QueueReport | None) -> list[Symptom]:
    """The symptoms of a suspended Job: pods that were asked to stop are no failure of the run.

    A pod that had ended by itself keeps its own reason. Of a Workload that was switched off nothing is to be retried.
    """
    own = [symptom for symptom in symptoms if symptom.pod and not (symptom.pod.gone or symptom.pod.deleting_at)]
    if report is not None and report.deactivated:
        return own
    preempted = report is not None and report.evicted == _PREEMPTED
    return [
        symptom
        if symptom in own
        else replace(
            symptom,
            failure_class=FailureClass.PREEMPTED if preempted else FailureClass.EVICTED,
            reason=_why(report),
            message=_describe_suspension(report),
            remedy="",
        )
        for symptom in symptoms
    ]


def decide_queued(
    job: JobView, pods: Sequence[PodView], report: QueueReport | None, now: datetime, grace: float
) -> Plan:
    """What to say of a Job that is suspended: it waits for quota, or its pods are ending."""
    if any(not pod.has_ended for pod in pods):
        message = f"{_describe_suspension(report)}. The pods are asked to save a checkpoint and end"
        return Plan(
            phase=Phase.RESTARTING, reason=_why(report), message=message, attempt=job.attempt,
            conditions={ConditionType.RUNNING: Mark(value=False, reason=_why(report), message=message)},
            requeue_after=seconds_to_lost(pods, now, grace),
        )  # fmt: skip
    return plan_queued(job.attempt, describe_queue(job.name, report))


def plan_queued(attempt: int, message: str, *, launch: int | None = None) -> Plan:
    """``attempt`` waits in a queue, for the reason in ``message``."""
    mark = Mark(value=False, reason="Queued", message=message)
    return Plan(
        phase=Phase.QUEUED, reason="Queued", message=message, attempt=attempt, launch=launch,
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
    number = "Waiting" if report.position is None else f"Number {report.position}"
    text = f"{number} in queue {report.queue}: {report.message or 'Kueue has not looked at it yet'}"
    return with_remedy(text, _INADMISSIBLE_REMEDY) if report.reason == _INADMISSIBLE else text


def uses_kueue(queue_name: str | None, settings: Settings) -> bool:
    """Whether ``queue_name`` is one of Kueue. Volcano has queues of its own, and holds back pods rather than Jobs."""
    return queue_name is not None and settings.gang_scheduler != "volcano"


def _why(report: QueueReport | None) -> str:
    return (report.evicted if report is not None else "") or _OTHER


def _describe_suspension(report: QueueReport | None) -> str:
    if report is None or not report.evicted:
        return "The Job was suspended by whoever manages its queue"
    return f"Kueue took the quota back: {report.evicted_message or report.evicted}".rstrip(". ")
