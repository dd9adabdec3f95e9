"""For how long a part of a gang holds its nodes while there is no room for the rest. All pure.

Without a gang scheduler the pods of a gang are placed one by one. Two gangs that each have half of what they need would
wait for each other for ever, and with them all that they hold (runPolicy.placementTimeoutSeconds). Who gives back waits
before the next try, each time twice as long, so that one of them gets through.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from lora_api import ConditionType, Failure, FailureClass
from lora_operator.diagnosis.obstacles import (
    describe_unscheduled,
    diagnose_refused,
    find_unscheduled,
    scheduling_remedy,
    waits_for_claim,
)
from lora_operator.diagnosis.silence import diagnose_unmade
from lora_operator.policies.nodes import describe_forgotten
from lora_operator.policies.restarts import compute_backoff
from lora_operator.state.facts import holds
from lora_operator.state.failures import new_failure, reword
from lora_operator.state.observed import Observed
from lora_operator.watched.views import JobView, PodView
from lora_operator.wording import name_pods

PLACEMENT_TIMEOUT = 600
"""Seconds, where the run names none."""

_UNSCHEDULABLE = "Unschedulable"
_NO_SCHEDULER_REMEDY = (
    "See whether the scheduler that spec.schedulerName of the pods names runs, and what its log says. The next attempt "
    "starts by itself."
)
_SCHEDULERS_WORDS, _AFFINITY = "nodes are available", "affinity"
"""What kube-scheduler says of each pod without a node, and of nodes that its affinity leaves out (1.29 to 1.37)."""


def has_no_node(pod: PodView) -> bool:
    """Whether ``pod`` waits for a node: for room, a claim, a gate, or a scheduler that does not come to it."""
    return not (pod.scheduled or pod.has_ended)


def lacks_room(pod: PodView) -> bool:
    """Whether no node has room for ``pod``. One that waits for a claim or a gate has another reason."""
    return has_no_node(pod) and pod.unscheduled_reason == _UNSCHEDULABLE and not waits_for_claim(pod)


def not_started(pods: Sequence[PodView]) -> list[PodView]:
    """The pods that have not begun to run, and have not ended either."""
    return [pod for pod in pods if pod.phase == "Pending" and not (pod.has_ended or pod.running)]


def begun_by(observed: Observed) -> frozenset[str]:
    """The uids of the pods of the gang that have begun to run, or have ended."""
    job = observed.live_job()
    pods = observed.gang(job) if job is not None else []
    late = not_started(pods)
    return frozenset(pod.uid for pod in pods if pod not in late)


def is_short_of_room(observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime) -> bool:
    """Whether a part of the gang has nodes and the rest has not, or the run itself keeps away from nodes with room.

    A gang that has none holds nothing, and waits where it is.
    """
    if any(pod.scheduled and not pod.has_ended for pod in pods):
        return _waits_for_pods(observed, job, pods, now)
    return bool(observed.run.status.avoided_nodes) and may_need_avoided(pods)


def _waits_for_pods(observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime) -> bool:
    """Whether some pod of the gang has no node, or is not made, for a full quota, a webhook that is away or no reason.

    A policy that denies a pod ends the attempt by itself, and sooner.
    """
    refusal = observed.reports.refusal
    refused = observed.is_short_of_pods(job) and refusal is not None and refusal.kind != "policy"
    unmade = diagnose_unmade(pods, job, observed.reports, now) is not None
    return refused or unmade or any(map(has_no_node, pods))


def seconds_to_giving_back(observed: Observed, now: datetime) -> float:
    """Seconds until a gang that is short of room gives back what it has."""
    asked = observed.run.spec.run_policy.placement_timeout_seconds
    since = observed.reports.short_of_room_since or now
    return float(PLACEMENT_TIMEOUT if asked is None else asked) - (now - since).total_seconds()


def waits_since(observed: Observed, attempt: int, created: datetime, base: float) -> datetime:
    """Since when the run waits for what ``attempt`` needs: its nodes, and before that leave to make its Job at all.

    That begins with the pause after the last failure, which is ``base`` seconds for the first, and not after the Job
    was ``created``. Failures for want of room are a part of the wait.
    """
    status = observed.run.status
    earlier = [one for one in status.failures if one.attempt < attempt]
    last = next((one for one in reversed(earlier) if one.failure_class is not FailureClass.NOT_PLACED), None)
    if last is None:
        return created
    pause = compute_backoff(max((status.recent_failures or 1) - 1, 0), base)
    return min(created, last.at + timedelta(seconds=pause))


def time_waited(observed: Observed, attempt: int, now: datetime, base: float) -> timedelta:
    """How long ``attempt`` has waited for its nodes since the last failure, where its gang never had all of them.

    Of one that had, the status has it already (``status.compute``).
    """
    status = observed.run.status
    if holds(status, ConditionType.SCHEDULED) or status.failing_since is None:
        return timedelta(0)
    job = observed.jobs.get(attempt)
    since = waits_since(observed, attempt, now if job is None else job.created, base)
    return now - min(now, max(since, status.failing_since))


def may_need_avoided(pods: Sequence[PodView]) -> bool:
    """Whether the nodes that the run avoids might have had room, so that the next attempt may use them again.

    The scheduler tells of nodes that are left out by the affinity of a pod, with which the run avoids them. Where it
    tells of others only, such as nodes that are full, those of the run are gone or cordoned, and would not help; nor
    would they where a quota is full.
    """
    words = [pod.unscheduled_message for pod in pods if lacks_room(pod)]
    return any(_AFFINITY in text or _SCHEDULERS_WORDS not in text for text in words)


def not_placed(observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime) -> Failure:
    """The end of an attempt for whose gang there was no room as a whole."""
    placed = sum(pod.scheduled or pod.has_ended for pod in pods)
    message = f"{placed} of {job.size} pods had a node. {describe_waits(observed, job, pods, now)}"
    if may_need_avoided(pods):
        message += describe_forgotten(observed.run.status.avoided_nodes or [])
    failure = new_failure(FailureClass.NOT_PLACED, job.attempt, message, now)
    remedy = _find_remedy(observed, job, pods, now)
    return failure.model_copy(update={"remedy": remedy}) if remedy else failure


def _find_remedy(observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime) -> str | None:
    """What helps where it is not more room."""
    if any(map(lacks_room, pods)):
        return None
    waiting, refusal = find_unscheduled(pods), observed.reports.refusal
    if waiting:
        return scheduling_remedy(waiting[0])
    if refusal is not None and observed.is_short_of_pods(job):
        return diagnose_refused(job, refusal).remedy
    unmade = diagnose_unmade(pods, job, observed.reports, now)
    if unmade is not None:
        return unmade.remedy
    return _NO_SCHEDULER_REMEDY if any(map(has_no_node, pods)) else None


def explain_by_room(
    failure: Failure, observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime
) -> Failure:
    """``failure`` of a gang that was never whole: a peer that was lost is one that found no room."""
    if failure.failure_class is FailureClass.PEER_LOST and _waits_for_pods(observed, job, pods, now):
        found = not_placed(observed, job, pods, now)
        kept = {name: getattr(failure, name) for name in ("pod", "node", "rank", "exit_code", "at")}
        return reword(found.model_copy(update=kept), f"{found.message}; {failure.pod} says: {failure.message}")
    waits = "; ".join(f"pod {pod.name} {_describe_start(pod)}" for pod in not_started(pods)[:3])
    return reword(failure, f"{failure.message}; {waits}") if waits else failure


def describe_waits(observed: Observed, job: JobView, pods: Sequence[PodView], now: datetime) -> str:
    """Which pods wait, and for what: the words of the scheduler or of the quota, each of them once."""
    waiting = find_unscheduled(pods)
    words = [describe_unscheduled(waiting).rstrip(".")] if waiting else []
    silent = [pod.name for pod in pods if has_no_node(pod) and pod not in waiting]
    if silent:
        words.append(f"No scheduler has come to {name_pods(silent)}")
    refusal = observed.reports.refusal
    if refusal is not None and observed.is_short_of_pods(job):
        words.append(f"{job.size - len(pods)} of {job.size} pods are not made: {refusal.message}")
    unmade = diagnose_unmade(pods, job, observed.reports, now)
    return "; ".join([*words, *([unmade.message] if unmade else [])])


def _describe_start(pod: PodView) -> str:
    why = f"{pod.waiting_reason} {pod.waiting_message}" if pod.waiting_reason else pod.unscheduled_message
    return f"had not started: {why}".rstrip(": ")
