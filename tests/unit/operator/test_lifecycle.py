"""decide(): every rule of the state machine as one row."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lora_api import RULES, ConditionType, FailureClass, Phase, build_run_spec
from lora_operator.lifecycle import decide
from lora_operator.observed import Observed, Refusal, Reports
from lora_operator.queueing import QueueReport
from lora_operator.runtimes import build_snapshot
from lora_operator.settings import Settings
from lora_operator.status import compute_status
from lora_operator.views import JobView, PodView
from tests.unit.operator.builders import (
    ADAPTER,
    NOW,
    a_job,
    a_pod,
    a_preflight,
    a_run,
    a_runtime,
    ago,
    condition,
    ended,
    failure,
    published,
    running,
    said,
    seen,
    stamp,
    taken,
    waiting,
)

SETTINGS = Settings(preflight="off", failure_grace=20.0, start_timeout=600.0, max_uncharged_restarts=3)


@dataclass(frozen=True)
class Case:
    """``want``: fields of the plan; a class stands for that of its failure."""

    name: str
    observed: Observed
    want: dict[str, Any] = field(default_factory=dict)
    failure: FailureClass | None = None
    marks: dict[ConditionType, tuple[bool, str]] = field(default_factory=dict)


JOB = a_job()
STARTED = {"attempt": 1}
SUSPENDED = {"suspend": True}
SUSPENDED_ONCE = {"attempt": 1, "suspendedAttempt": 1}
IMPATIENT = {"stallTimeoutSeconds": 60}
LONG_GONE = {"attempt": 1, "conditions": [condition("Failed")], "completionTime": stamp(ago(100))}
QUEUED = a_job(suspended=True, was_suspended=True)
RESUMED = a_job(was_suspended=True, started=ago(10))
TAKEN_PODS = (
    ended(0, 75, said("Checkpointed"), deleting_at=ago(-100), tracked=False, gone=True),
    ended(1, 70, said("Internal"), deleting_at=ago(-100), tracked=False, gone=True),
)
QUEUE = {"queueName": "team-a"}
WAITS = QueueReport(workload="job-tickets-1-x", queue="team-a", message="no quota for cpu", position=2)
TAKEN = replace(WAITS, evicted="Preempted", evicted_message="Preempted to accommodate another", position=None)
SWITCHED_OFF = replace(TAKEN, evicted="Deactivated", evicted_message="The workload is deactivated")
FAILED_ONCE = {"attempt": 1, "failures": [failure(1)], "chargedRestarts": 1}
NOTHING = {"phase": None, "launch": None, "delete": None, "stop": None, "failure": None, "requeue_after": None}

RUNTIME = a_runtime("h100", generation=3, image="trainer:7", limits={"maxNodes": 2})
REFERENCE = {"runtimeRef": {"name": "h100"}}

CASES = [
    # Runtime
    Case(
        "a run takes its runtime before anything is created",
        seen(a_run(**REFERENCE), runtime=RUNTIME),
        {
            "runtime": build_snapshot(RUNTIME), "launch": None, "attempt": 0, "phase": Phase.PENDING,
            "reason": "RuntimeTaken", "requeue_after": 0.0,
        },
    ),
    Case(
        "a run that has taken its runtime is launched",
        seen(a_run(status={"runtime": build_snapshot(RUNTIME).to_wire()}, **REFERENCE)),
        {"launch": 1, "runtime": None},
    ),
    Case(
        "the default runtime is taken without being named",
        seen(a_run(), runtime=a_runtime()),
        {"runtime": build_snapshot(a_runtime()), "launch": None},
    ),
    Case(
        "a runtime that is not there is waited for",
        seen(a_run(**REFERENCE)),
        {"launch": None, "phase": Phase.PENDING, "reason": "RuntimeNotFound", "requeue_after": None, "failure": None},
    ),
    Case(
        "a suspended run takes no runtime yet, not even one that would refuse it",
        seen(a_run(runPolicy=SUSPENDED, parallelism={"nodes": 3, "gpusPerNode": 0}, **REFERENCE), runtime=RUNTIME),
        {"runtime": None, "launch": None, "phase": Phase.SUSPENDED},
    ),
    Case(
        "a run that asks for too much ends, and says whose runtime it was",
        seen(a_run(parallelism={"nodes": 3, "gpusPerNode": 0}, **REFERENCE), runtime=RUNTIME),
        {"attempt": 0, "phase": Phase.FAILED, "ended": True, "runtime": build_snapshot(RUNTIME)},
        FailureClass.RUNTIME_REFUSED,
    ),
    Case(
        "a run without a store ends",
        seen(a_run(publish={})),
        {"attempt": 0, "phase": Phase.FAILED, "ended": True, "runtime": None},
        FailureClass.BAD_SPEC,
    ),
    Case(
        "a run that began without a runtime takes none later",
        seen(a_run(status=STARTED), JOB, running(0), running(1), runtime=RUNTIME),
        {"runtime": None, "phase": Phase.RUNNING},
    ),
    Case(
        "a run whose snapshot was taken away ends once it would need it",
        seen(a_run(status=FAILED_ONCE, publish={}), runtime=RUNTIME),
        {"attempt": 1, "launch": None, "phase": Phase.FAILED, "runtime": None},
        FailureClass.BAD_SPEC,
    ),
    Case(
        "but not before",
        seen(a_run(status=STARTED, publish={}), JOB, running(0), running(1)),
        {"phase": Phase.RUNNING},
    ),
    Case(
        "nor does one whose Job the status does not know yet",
        seen(a_run(), JOB, runtime=a_runtime()),
        {"runtime": None, "launch": None, "attempt": 1},
    ),
    # Launch
    Case(
        "a new run is launched",
        seen(a_run()),
        {"launch": 1, "attempt": 1, "phase": Phase.STARTING},
        marks={ConditionType.SCHEDULED: (False, "PodsPending"), ConditionType.RUNNING: (False, "Starting")},
    ),
    Case(
        "a run that is being deleted is left alone",
        seen(a_run(metadata={"deletionTimestamp": "2026-11-23T12:00:00Z"})),
        NOTHING,
    ),
    Case(
        "a Job that exists before the status knows it is not launched again",
        seen(a_run(), JOB),
        {"launch": None, "attempt": 1, "phase": Phase.STARTING},
    ),
    Case(
        "a Job of an earlier run of the same name is none of ours",
        seen(a_run(), a_job(owner_uid="another")),
        {"launch": 1},
    ),
    Case(
        "pods of an earlier run of the same name are waited for",
        seen(a_run(), running(job_uid="gone", deleting_at=ago(-30))),
        {"launch": None, "phase": Phase.PENDING, "requeue_after": 50.0},
    ),
    Case(
        "a pod that should be gone for long holds nobody up",
        seen(a_run(), running(job_uid="gone", deleting_at=ago(21))),
        {"launch": 1},
    ),
    # In a queue
    Case(
        "a run that names a queue is launched into it",
        seen(a_run(runPolicy=QUEUE)),
        {"launch": 1, "phase": Phase.QUEUED, "reason": "Queued"},
        marks={ConditionType.SCHEDULED: (False, "Queued"), ConditionType.RUNNING: (False, "Queued")},
    ),
    Case(
        "a suspended Job waits, with its number and Kueue's words",
        seen(a_run(status=STARTED), QUEUED, reports=Reports(queue=WAITS)),
        {
            "phase": Phase.QUEUED, "launch": None, "delete": None, "stop": None,
            "message": "Number 2 in queue team-a: no quota for cpu",
        },
        marks={ConditionType.SCHEDULED: (False, "Queued"), ConditionType.RUNNING: (False, "Queued")},
    ),
    Case(
        "a Job that somebody made suspended without a queue waits too",
        seen(a_run(status=STARTED), QUEUED),
        {"phase": Phase.QUEUED, "message": "Waiting for the queue to let the run go"},
    ),
    Case(
        "a run that waits is suspended by its user",
        seen(a_run(status=STARTED, runPolicy={**QUEUE, **SUSPENDED}), QUEUED, reports=Reports(queue=WAITS)),
        {"phase": Phase.SUSPENDED, "suspended": 1},
    ),
    Case(
        "the Job that waits was deleted by somebody",
        seen(a_run(status=STARTED), replace(QUEUED, deleting=True)),
        {"phase": Phase.RESTARTING},
        FailureClass.POD_LOST,
    ),
    Case(
        "a gang whose quota is taken back may save a checkpoint",
        seen(
            a_run(status=STARTED), QUEUED, taken(0, deleting_at=ago(-100)), running(1), reports=Reports(queue=TAKEN)
        ),
        {"phase": Phase.QUEUED, "reason": "Preempted", "failure": None, "requeue_after": 121.0},
        marks={ConditionType.SCHEDULED: (False, "Preempted"), ConditionType.RUNNING: (False, "Preempted")},
    ),
    Case(
        "somebody else suspends the Job",
        seen(a_run(status=STARTED), QUEUED, taken(0), taken(1)),
        {"phase": Phase.QUEUED, "reason": "JobSuspended", "failure": None},
    ),
    Case(
        "pods that end after their quota was taken back are no failure, whatever they say",
        seen(a_run(status=STARTED), QUEUED, *TAKEN_PODS, reports=Reports(queue=WAITS)),
        {"phase": Phase.QUEUED, "reason": "Queued", "failure": None, "delete": None, "requeue_after": None},
    ),
    Case(
        "a gang that is let go again waits for new pods, and not for those that were taken back",
        seen(a_run(status=STARTED), RESUMED, *TAKEN_PODS),
        {"phase": Phase.STARTING, "failure": None},
    ),
    Case(
        "a gang that is let go while its old pods still save a checkpoint",
        seen(a_run(status=STARTED), RESUMED, taken(0, deleting_at=ago(-50)), taken(1, deleting_at=ago(-50))),
        {"phase": Phase.STARTING, "failure": None, "requeue_after": 71.0},
    ),
    Case(
        "new pods take the place of those that were taken back",
        seen(a_run(status=STARTED), RESUMED, *TAKEN_PODS, running(0, created=ago(5)), running(1, created=ago(5))),
        {"phase": Phase.RUNNING, "failure": None},
    ),
    Case(
        "a node that does not answer when the quota is taken back ends the attempt: nothing would run in its place",
        seen(a_run(status=STARTED), RESUMED, taken(0, deleting_at=ago(21)), *TAKEN_PODS[1:]),
        {"phase": Phase.RUNNING, "reason": "PodFailed", "failing": True},
    ),
    Case(
        "an index that ended before its pod was taken back would not run again",
        seen(
            a_run(status=STARTED), a_job(suspended=True, was_suspended=True, failed_indexes=frozenset({1})),
            TAKEN_PODS[0], ended(1, 75, said("Checkpointed")),
            reports=Reports(queue=TAKEN, failing_since=ago(21)),
        ),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.CHECKPOINTED,
    ),
    Case(
        "the same where nobody has seen the pod",
        seen(a_run(status=STARTED), a_job(suspended=True, was_suspended=True, failed_indexes=frozenset({0, 1}))),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.POD_LOST,
    ),
    Case(
        "nor would one that had done its work",
        seen(
            a_run(status=STARTED), a_job(suspended=True, was_suspended=True, completed_indexes=frozenset({1})),
            TAKEN_PODS[0], ended(1, 0, reason="Completed"),
        ),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.EVICTED,
    ),
    Case(
        "a run whose Workload is switched off waits until somebody switches it on",
        seen(a_run(status=STARTED), QUEUED, *TAKEN_PODS, reports=Reports(queue=SWITCHED_OFF)),
        {
            "phase": Phase.QUEUED, "failure": None, "delete": None, "launch": None,
            "message": "Workload job-tickets-1-x: The workload is deactivated. Remedy: Set spec.active of the Workload "
            "to true to let the run go on.",
        },
    ),
    Case(
        "what had failed by itself before is the run's own failure",
        seen(a_run(status=STARTED), QUEUED, ended(0, 65, said("BadData"), at=ago(5)), ended(1, 73, said("PeerLost"))),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.BAD_DATA,
    ),
    Case(
        "an adapter that was published before counts",
        seen(a_run(status=STARTED), QUEUED, ended(0, 0, published(), reason="Completed"), taken(1)),
        {"phase": Phase.SUCCEEDED},
    ),
    Case(
        "a pod that somebody deletes is counted, and no quota was taken back",
        seen(
            a_run(status=STARTED), replace(RESUMED, failed_indexes=frozenset({1})), running(0),
            ended(1, 75, said("Checkpointed"), deleting_at=NOW, tracked=False, gone=True),
        ),
        {"reason": "PodFailed", "failing": True},
    ),
    Case(
        "nothing is taken back from a Job that was never suspended",
        seen(a_run(status=STARTED), JOB, running(0), ended(1, 75, deleting_at=NOW, tracked=False, gone=True)),
        {"reason": "PodFailed", "failing": True},
    ),
    Case(
        "another attempt of a run with a queue is queued",
        seen(a_run(status=FAILED_ONCE, runPolicy=QUEUE)),
        {"launch": 2, "phase": Phase.QUEUED},
    ),
    Case(
        "neither a long wait in the queue nor an old refusal counts as time in which pods were refused",
        seen(
            a_run(status=STARTED), a_job(created=ago(9e6), started=ago(9e6)),
            reports=Reports(refusal=Refusal("etcd has no leader", ago(5))),
        ),
        {"phase": Phase.STARTING, "reason": "PodNotStarted", "failure": None, "requeue_after": 595.0},
    ),
    # On the way up
    Case(
        "pods without a node",
        seen(a_run(status=STARTED), JOB, a_pod(0), a_pod(1)),
        {"phase": Phase.STARTING, "requeue_after": None},
        marks={ConditionType.SCHEDULED: (False, "PodsPending"), ConditionType.RUNNING: (False, "Starting")},
    ),
    Case(
        "all pods have a node, one runs",
        seen(a_run(status=STARTED), JOB, running(0), a_pod(1, scheduled=True)),
        {"phase": Phase.STARTING},
        marks={ConditionType.SCHEDULED: (True, "PodsScheduled"), ConditionType.RUNNING: (False, "Starting")},
    ),
    Case(
        "all pods run",
        seen(a_run(status=STARTED), JOB, running(0), running(1)),
        {"phase": Phase.RUNNING, "reason": "Running"},
        marks={ConditionType.SCHEDULED: (True, "PodsScheduled"), ConditionType.RUNNING: (True, "PodsRunning")},
    ),
    Case(
        "the stage of the trainer is the reason",
        seen(a_run(status=STARTED), JOB, running(0), running(1), reports=Reports(stage="loading")),
        {"phase": Phase.RUNNING, "reason": "LoadingModel"},
    ),
    Case(
        "publishing is a phase of its own",
        seen(a_run(status=STARTED), JOB, running(0), running(1), reports=Reports(stage="publishing")),
        {"phase": Phase.PUBLISHING},
    ),
    Case(
        "an image that cannot be pulled is shown at once",
        seen(a_run(status=STARTED), JOB, waiting(0, "ErrImagePull", "not found"), running(1)),
        {"phase": Phase.STARTING, "reason": "ImagePullFailed", "requeue_after": 510.0, "failure": None},
        marks={ConditionType.RUNNING: (False, "ImagePullFailed")},
    ),
    Case(
        "an image that cannot be pulled for long ends the run",
        seen(a_run(status=STARTED), JOB, waiting(0, "ImagePullBackOff", created=ago(601)), running(1)),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.IMAGE_PULL_FAILED,
    ),
    Case(
        "a missing Secret ends the run after a while",
        seen(a_run(status=STARTED), JOB, waiting(0, "CreateContainerConfigError", created=ago(601)), running(1)),
        {"phase": Phase.FAILED},
        FailureClass.POD_NOT_STARTED,
    ),
    Case(
        "a gang that fits nowhere waits for ever",
        seen(
            a_run(status=STARTED), a_job(created=ago(9e6)),
            *(a_pod(index, created=ago(9e6), unscheduled_reason="Unschedulable") for index in (0, 1)),
        ),
        {"phase": Phase.STARTING, "reason": "Unschedulable", "requeue_after": None, "failure": None},
        marks={ConditionType.SCHEDULED: (False, "Unschedulable"), ConditionType.RUNNING: (False, "Unschedulable")},
    ),
    Case(
        "a quota that is full is waited for",
        seen(a_run(status=STARTED), JOB, reports=Reports(refusal=Refusal("exceeded quota: few", ago(9e5)))),
        {"reason": "QuotaExceeded", "failure": None},
        marks={ConditionType.SCHEDULED: (False, "QuotaExceeded")},
    ),
    Case(
        "pods that are refused for long end the run",
        seen(a_run(status=STARTED), JOB, reports=Reports(refusal=Refusal("violates PodSecurity", ago(601)))),
        {"phase": Phase.FAILED},
        FailureClass.POD_NOT_STARTED,
    ),
    # Success
    Case(
        "rank 0 says what it published",
        seen(a_run(status=STARTED), JOB, ended(0, 0, published()), ended(1, 0)),
        {"phase": Phase.SUCCEEDED, "ended": True, "failure": None},
        marks={
            ConditionType.PUBLISHED: (True, "Succeeded"),
            ConditionType.COMPLETE: (True, "Succeeded"),
            ConditionType.RUNNING: (False, "Succeeded"),
        },
    ),
    Case(
        "an adapter in the store is not taken back by a peer that fails later",
        seen(a_run(status=STARTED), JOB, ended(0, 0, published()), ended(1, 73, said("PeerLost"))),
        {"phase": Phase.SUCCEEDED},
    ),
    Case(
        "an adapter in the store counts though the Job was deleted",
        seen(a_run(status=STARTED), a_job(deleting=True), ended(0, 0, published(), gone=True)),
        {"phase": Phase.SUCCEEDED},
    ),
    Case(
        "a peer that is done before rank 0 is no news",
        seen(a_run(status=STARTED), JOB, running(0), ended(1, 0)),
        {"phase": Phase.RUNNING},
    ),
    Case(
        "success without an adapter is none",
        seen(a_run(status=STARTED), JOB, ended(0, 0, "hello"), ended(1, 0)),
        {"phase": Phase.RESTARTING, "charged": True},
        FailureClass.INTERNAL,
    ),
    # Failure
    Case(
        "a failed pod gives its peers a moment",
        seen(a_run(status=STARTED), JOB, running(0), ended(1, 65, said("BadData"))),
        {"failing": True, "requeue_after": 20.0, "reason": "PodFailed", "failure": None},
        marks={ConditionType.RUNNING: (False, "PodFailed")},
    ),
    Case(
        "the moment counts from when the operator saw it",
        seen(
            a_run(status=STARTED), JOB, running(0), ended(1, 65, said("BadData"), at=ago(500)),
            reports=Reports(failing_since=ago(5)),
        ),
        {"failing": True, "requeue_after": 15.0},
    ),
    Case(
        "after the moment the attempt is over",
        seen(
            a_run(status=STARTED), JOB, running(0), ended(1, 65, said("BadData")),
            reports=Reports(failing_since=ago(20)),
        ),
        {"phase": Phase.FAILED, "ended": True, "failing": False},
        FailureClass.BAD_DATA,
    ),
    Case(
        "when all pods have ended there is nothing to wait for",
        seen(a_run(status=STARTED), JOB, ended(0, 73, said("PeerLost")), ended(1, 70, said("Internal"))),
        {"phase": Phase.RESTARTING, "charged": True, "launch": None, "delete": None},
        FailureClass.INTERNAL,
    ),
    Case(
        "a pod that is asked to stop may save its checkpoint first",
        seen(a_run(status=STARTED), JOB, running(0), running(1, deleting_at=ago(-100))),
        {"phase": Phase.RUNNING, "failing": False, "requeue_after": 121.0},
    ),
    Case(
        "a pod that outlives its deletion has lost its node",
        seen(
            a_run(status=STARTED), JOB, running(0), running(1, deleting_at=ago(21)),
            reports=Reports(failing_since=ago(20)),
        ),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.NODE_LOST,
    ),
    Case(
        "a Job that is gone takes the attempt along",
        seen(a_run(status=STARTED)),
        {"phase": Phase.RESTARTING, "charged": False, "launch": None},
        FailureClass.POD_LOST,
    ),
    Case(
        "a Job that somebody deletes takes the attempt along",
        seen(a_run(status=STARTED), a_job(deleting=True), running(0), running(1)),
        {"phase": Phase.RESTARTING},
        FailureClass.POD_LOST,
    ),
    Case(
        "a pod that failed and is gone is known from the Job",
        seen(a_run(status=STARTED), a_job(failed_indexes=frozenset({0, 1}))),
        {"phase": Phase.RESTARTING},
        FailureClass.POD_LOST,
    ),
    Case(
        "what rank 0 said of its success is gone with it, so the attempt is made again",
        seen(a_run(status=STARTED), a_job(completed_indexes=frozenset({0, 1}))),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.POD_LOST,
    ),
    Case(
        "a pod that the Job controller made twice and takes away again is no loss",
        seen(
            a_run(status=STARTED), JOB, running(0), running(1),
            running(0, name="tickets-1-0-again", uid="again", created=ago(80), deleting_at=ago(-30)),
            ended(1, 143, name="tickets-1-1-again", uid="again-1", created=ago(80), gone=True),
        ),
        {"phase": Phase.RUNNING, "reason": "Running", "failure": None},
    ),
    Case(
        "restarts come to an end",
        seen(
            a_run(status={"attempt": 4, "chargedRestarts": 3}), a_job(4),
            *(ended(index, 70, said("Internal"), attempt=4, job_uid="job-4") for index in (0, 1)),
        ),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.INTERNAL,
    ),
    Case(
        "restarts that are not charged come to an end too",
        seen(
            a_run(status={"attempt": 4}), a_job(4),
            *(ended(index, 75, said("Checkpointed"), attempt=4, job_uid="job-4") for index in (0, 1)),
        ),
        {"phase": Phase.FAILED},
        FailureClass.CHECKPOINTED,
    ),
    # Restart
    Case(
        "the Job of a failed attempt is deleted",
        seen(a_run(status=FAILED_ONCE), JOB, ended(0), ended(1)),
        {"delete": JOB, "launch": None, "phase": None},
    ),
    Case(
        "a Job that is on its way out is not deleted again",
        seen(a_run(status=FAILED_ONCE), a_job(deleting=True), ended(0), ended(1)),
        NOTHING,
    ),
    Case(
        "the next attempt waits for the pods of the last one",
        seen(a_run(status=FAILED_ONCE), running(0, deleting_at=ago(-60))),
        {"launch": None, "phase": None, "requeue_after": 80.0},
    ),
    Case(
        "the next attempt is launched",
        seen(a_run(status=FAILED_ONCE), ended(0, gone=True)),
        {"launch": 2, "attempt": 2, "phase": Phase.RESTARTING},
    ),
    Case(
        "a next attempt that was launched is followed, not launched again",
        seen(a_run(status=FAILED_ONCE), a_job(2), running(0, 2), running(1, 2)),
        {"launch": None, "attempt": 2, "phase": Phase.RUNNING},
    ),
    # Pauses
    Case(
        "a restart that is charged is put off",
        seen(a_run(status={**FAILED_ONCE, "retryTime": stamp(ago(-7))}), ended(0, gone=True)),
        {"launch": None, "phase": None, "requeue_after": 7.0},
    ),
    Case(
        "and comes when its time has come",
        seen(a_run(status={**FAILED_ONCE, "retryTime": stamp(NOW)}), ended(0, gone=True)),
        {"launch": 2},
    ),
    Case(
        "the pause doubles with each charged restart",
        seen(
            a_run(status={"attempt": 3, "chargedRestarts": 2}), a_job(3),
            *(ended(index, 70, said("Internal"), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.RESTARTING, "backoff": 40.0},
        FailureClass.INTERNAL,
    ),
    Case(
        "a restart that is not charged has no pause",
        seen(a_run(status=STARTED), JOB, *(ended(index, 75, said("Checkpointed")) for index in (0, 1))),
        {"phase": Phase.RESTARTING, "backoff": 0.0},
        FailureClass.CHECKPOINTED,
    ),
    Case(
        "the same failure at the same step for the third time is no accident",
        seen(
            a_run(
                status={
                    "attempt": 3, "chargedRestarts": 2,
                    "failures": [{**failure(number), "step": 40} for number in (1, 2)],
                }
            ),
            a_job(3),
            *(ended(index, 70, said("Internal", step=40), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.INTERNAL,
    ),
    Case(
        "the same failure at another step is one",
        seen(
            a_run(
                status={
                    "attempt": 3, "chargedRestarts": 2,
                    "failures": [{**failure(number), "step": 39 + number} for number in (1, 2)],
                }
            ),
            a_job(3),
            *(ended(index, 70, said("Internal", step=41), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.RESTARTING},
        FailureClass.INTERNAL,
    ),
    Case(
        "another failure at the same step is one too",
        seen(
            a_run(
                status={
                    "attempt": 3, "chargedRestarts": 2,
                    "failures": [{**failure(1), "step": 40}, {**failure(2, "StoreUnavailable"), "step": 40}],
                }
            ),
            a_job(3),
            *(ended(index, 70, said("Internal", step=40), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.RESTARTING},
        FailureClass.INTERNAL,
    ),
    # Suspend
    Case(
        "a run that is created suspended waits",
        seen(a_run(runPolicy=SUSPENDED)),
        {"phase": Phase.SUSPENDED, "reason": "Suspended", "launch": None, "attempt": 0, "requeue_after": None},
        marks={ConditionType.RUNNING: (False, "Suspended")},
    ),
    Case(
        "a gang that runs is first put on record as suspended",
        seen(a_run(status=STARTED, runPolicy=SUSPENDED), JOB, running(0), running(1)),
        {"phase": Phase.SUSPENDED, "reason": "Suspending", "suspended": 1, "delete": None, "failure": None},
        marks={ConditionType.RUNNING: (False, "Suspending")},
    ),
    Case(
        "then its Job is deleted",
        seen(a_run(status=SUSPENDED_ONCE, runPolicy=SUSPENDED), JOB, running(0), running(1)),
        {"delete": JOB, "phase": None, "failure": None},
    ),
    Case(
        "then its pods save a checkpoint",
        seen(a_run(status=SUSPENDED_ONCE, runPolicy=SUSPENDED), running(0, deleting_at=ago(-60))),
        {"phase": Phase.SUSPENDED, "reason": "Suspending", "launch": None},
    ),
    Case(
        "then nothing runs",
        seen(a_run(status=SUSPENDED_ONCE, runPolicy=SUSPENDED), ended(0, 75, gone=True)),
        {"phase": Phase.SUSPENDED, "reason": "Suspended", "launch": None, "attempt": 1, "requeue_after": None},
    ),
    Case(
        "a run that is resumed goes on as the next attempt, without a failure",
        seen(a_run(status=SUSPENDED_ONCE)),
        {"launch": 2, "attempt": 2, "failure": None},
    ),
    Case(
        "a run that is resumed while its pods end waits for them",
        seen(a_run(status=SUSPENDED_ONCE), running(0, deleting_at=ago(-60))),
        {"launch": None, "requeue_after": 80.0},
    ),
    Case(
        "an adapter that is published before the suspension counts",
        seen(a_run(status=STARTED, runPolicy=SUSPENDED), JOB, ended(0, 0, published()), running(1)),
        {"phase": Phase.SUCCEEDED},
    ),
    Case(
        "a failure before the suspension counts too",
        seen(a_run(status=STARTED, runPolicy=SUSPENDED), JOB, *(ended(n, 65, said("BadData")) for n in (0, 1))),
        {"phase": Phase.FAILED},
        FailureClass.BAD_DATA,
    ),
    Case(
        "a restart waits while the run is suspended",
        seen(a_run(status=FAILED_ONCE, runPolicy=SUSPENDED), ended(0, gone=True)),
        {"phase": Phase.SUSPENDED, "launch": None},
    ),
    # Deadline and stall
    Case(
        "the deadline counts the time of earlier attempts and of this one",
        seen(
            a_run(
                status={"attempt": 2, "activeSeconds": 70, "conditions": [condition("Running", at=ago(30))]},
                runPolicy={"activeDeadlineSeconds": 100},
            ),
            a_job(2), running(0, 2), running(1, 2),
        ),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.DEADLINE_EXCEEDED,
    ),
    Case(
        "a deadline that has not passed is waited for",
        seen(
            a_run(
                status={"attempt": 2, "activeSeconds": 60, "conditions": [condition("Running", at=ago(30))]},
                runPolicy={"activeDeadlineSeconds": 100},
            ),
            a_job(2), running(0, 2), running(1, 2),
        ),
        {"phase": Phase.RUNNING, "requeue_after": 10.0},
    ),
    Case(
        "no attempt is launched after the deadline",
        seen(a_run(status={**FAILED_ONCE, "activeSeconds": 100}, runPolicy={"activeDeadlineSeconds": 100})),
        {"phase": Phase.FAILED, "launch": None, "attempt": 1},
        FailureClass.DEADLINE_EXCEEDED,
    ),
    Case(
        "a gang that says nothing is stalled",
        seen(
            a_run(status={**STARTED, "conditions": [condition("Running", at=ago(900))]}, runPolicy=IMPATIENT),
            JOB, running(0), running(1), reports=Reports(heard_at=ago(60)),
        ),
        {"phase": Phase.RESTARTING, "charged": True},
        FailureClass.STALLED,
    ),
    Case(
        "a gang that spoke lately is not",
        seen(
            a_run(status={**STARTED, "conditions": [condition("Running", at=ago(900))]}, runPolicy=IMPATIENT),
            JOB, running(0), running(1), reports=Reports(heard_at=ago(59)),
        ),
        {"phase": Phase.RUNNING, "requeue_after": 1.0},
    ),
    Case(
        "a gang that never said a word has as long from when it began to run",
        seen(
            a_run(status={**STARTED, "conditions": [condition("Running", at=ago(20))]}, runPolicy=IMPATIENT),
            JOB, running(0), running(1),
        ),
        {"phase": Phase.RUNNING, "requeue_after": 40.0},
    ),
    # The end
    Case(
        "what a run was made of is deleted after a while",
        seen(
            a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60}),
            a_job(failed_indexes=frozenset({0, 1})), ended(0), ended(1),
        ),
        {"clean_up": True, "delete_run": False, "delete": None, "stop": None},
    ),
    Case(
        "and that is it",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60})),
        NOTHING,
    ),
    Case(
        "the run goes too where that is asked for",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60, "ttlDeletes": "run"})),
        {"clean_up": False, "delete_run": True},
    ),
    Case(
        "nothing is deleted before its time",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 500}), JOB, ended(0), ended(1)),
        {"clean_up": False, "requeue_after": 400.0},
    ),
    Case(
        "a run that has succeeded stays so, whatever is deleted",
        seen(a_run(status={"attempt": 1, "conditions": [condition("Complete")]})),
        NOTHING,
    ),
    Case(
        "a run that has failed stays so",
        seen(a_run(status={"attempt": 1, "conditions": [condition("Failed")]}), JOB, ended(0), ended(1)),
        NOTHING,
    ),
    Case(
        "pods that hang after the end are ended, the failed ones kept",
        seen(
            a_run(status={"attempt": 1, "conditions": [condition("Failed")]}),
            a_job(failed_indexes=frozenset({1})), running(0), ended(1),
        ),
        {"stop": a_job(failed_indexes=frozenset({1})), "delete": None},
    ),
    Case(
        "a Job that is being ended is not ended again",
        seen(
            a_run(status={"attempt": 1, "conditions": [condition("Failed")]}),
            a_job(failed_indexes=frozenset({1}), stopping=True), running(0), ended(1),
        ),
        NOTHING,
    ),
    Case(
        "pods that never ran are deleted with their Job",
        seen(
            a_run(status={"attempt": 1, "conditions": [condition("Failed")]}),
            JOB, waiting(0, "ImagePullBackOff"), waiting(1, "ImagePullBackOff"),
        ),
        {"delete": JOB, "stop": None},
    ),
    Case(
        "after success the peers have a moment to leave",
        seen(
            a_run(
                status={
                    "attempt": 1, "conditions": [condition("Complete")], "adapter": ADAPTER,
                    "completionTime": "2026-11-23T11:59:55Z",
                }
            ),
            JOB, ended(0, 0, published()), running(1),
        ),
        {"delete": None, "stop": None, "requeue_after": 15.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decide(case: Case) -> None:
    plan = decide(case.observed, NOW, SETTINGS)
    assert {name: getattr(plan, name) for name in case.want} == case.want
    assert (plan.failure.failure_class if plan.failure else None) == case.failure
    found = {kind: (mark.value, mark.reason) for kind, mark in plan.conditions.items() if kind in case.marks}
    assert found == case.marks


LOST = ended(0, 73, said("PeerLost"))
SILENT: dict[str, tuple[tuple[PodView, ...], float, FailureClass | None, float | None]] = {
    "a silent peer has time to turn out lost": ((LOST, running(1)), 60.0, None, 30.0),
    "but not for ever": ((LOST, running(1)), 91.0, FailureClass.PEER_LOST, None),
    "its node is gone: the usual moment": ((LOST, running(1, unready=True)), 5.0, None, 15.0),
    "and then it is the node's fault": ((LOST, running(1, unready=True)), 21.0, FailureClass.NODE_LOST, None),
    "a node that is gone says nothing of a gang that trains": ((running(0), running(1, unready=True)), 0.0, None, None),
}


@pytest.mark.parametrize("name", SILENT)
def test_who_is_silent_is_given_time(name: str) -> None:
    pods, elapsed, want, left = SILENT[name]
    reports = Reports(run_uid="run-uid", failing_since=ago(elapsed) if elapsed else None)
    plan = decide(seen(a_run(status=STARTED), JOB, *pods, reports=reports), NOW, SETTINGS)
    assert (plan.failure.failure_class if plan.failure else None) == want
    assert plan.requeue_after == left
    if want is not None:
        assert plan.charged == (want == FailureClass.PEER_LOST)


LAUNCHES: dict[str, tuple[Observed, JobView, Settings]] = {
    "an attempt": (seen(a_run()), JOB, SETTINGS),
    "another attempt": (seen(a_run(status=FAILED_ONCE)), a_job(2), SETTINGS),
    "an attempt in a queue": (seen(a_run(runPolicy=QUEUE)), a_job(suspended=True), SETTINGS),
    "a preflight": (seen(a_run()), a_preflight(), replace(SETTINGS, preflight="on")),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_job_that_is_seen_after_its_launch_changes_nothing(name: str) -> None:
    """Each change of the status would be a write of its own, for each run that waits for its pods."""
    observed, job, settings = LAUNCHES[name]
    launched = compute_status(observed.run, decide(observed, NOW, settings), Reports(), NOW)
    again = seen(observed.run.model_copy(update={"status": launched}), replace(job, created=NOW, started=None))
    assert compute_status(again.run, decide(again, NOW, settings), Reports(), NOW) == launched


SHRINK = {"onOutOfMemory": "shrinkMicroBatch"}
SHRINKS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any], int | None]] = {
    "half of what the specification says": ({}, {}, "GPUOutOfMemory", {}, 2),
    "half of what it was last": ({}, {"microBatchSize": 2}, "GPUOutOfMemory", {}, 1),
    "half of what the trainer says": ({"microBatchSize": "auto"}, {}, "GPUOutOfMemory", {"microBatchSize": 4}, 2),
    "half of what was planned": (
        {"microBatchSize": "auto"}, {"plan": {"microBatchSize": 4, "processes": 2, "shardSize": 2}},
        "HostOutOfMemory", {}, 2,
    ),
    "a size that divides": ({"globalBatchSize": 36, "microBatchSize": 9}, {}, "GPUOutOfMemory", {}, 3),
    "one sequence is the least": ({"microBatchSize": 1}, {}, "GPUOutOfMemory", {}, None),
    "nobody knows what it was": ({"microBatchSize": "auto"}, {}, "HostOutOfMemory", {}, None),
    "another failure": ({}, {}, "Diverged", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHRINKS)
def test_the_micro_batch_shrinks(name: str) -> None:
    training, status, failure_class, words, want = SHRINKS[name]
    run = a_run(
        status={"attempt": 1, **status},
        runPolicy=SHRINK,
        training={"maxSteps": 18, "globalBatchSize": 8, "microBatchSize": 4, **training},
    )
    pods = [ended(index, 71, said(failure_class, **words)) for index in (0, 1)]
    plan = decide(seen(run, JOB, *pods), NOW, SETTINGS)
    assert (plan.micro_batch_size, plan.ended, plan.charged) == (want, want is None, False)
    new = compute_status(run, plan, Reports(), NOW)
    if want is None:
        assert plan.phase == Phase.FAILED
        return
    assert f"micro-batches of {want} instead of" in plan.message
    again = run.model_copy(update={"status": new})
    assert build_run_spec(again, 2).training.micro_batch_size == want
    assert build_run_spec(again, 2).batch.global_batch_size == run.spec.training.global_batch_size


def test_without_being_asked_nothing_shrinks() -> None:
    pods = [ended(index, 71, said("GPUOutOfMemory")) for index in (0, 1)]
    plan = decide(seen(a_run(status=STARTED), JOB, *pods), NOW, SETTINGS)
    assert (plan.phase, plan.micro_batch_size) == (Phase.FAILED, None)


@pytest.mark.parametrize("failure_class", list(FailureClass))
def test_the_table_says_what_follows_a_failure(failure_class: FailureClass) -> None:
    rule = RULES[failure_class]
    pods = [ended(index, 70, said(str(failure_class), "record 7 is broken.")) for index in (0, 1)]
    plan = decide(seen(a_run(status=STARTED), JOB, *pods), NOW, SETTINGS)
    assert plan.failure is not None
    assert (plan.failure.failure_class, plan.failure.remedy) == (failure_class, rule.remedy)
    assert (plan.phase == Phase.RESTARTING, plan.ended) == (rule.retried, not rule.retried)
    assert plan.charged == (rule.charged and rule.retried)
    assert plan.message == f"record 7 is broken. Remedy: {rule.remedy}"


def test_a_refused_restart_says_which_limit_refuses_it() -> None:
    run = a_run(status={"attempt": 1}, runPolicy={"maxRestarts": 0})
    plan = decide(seen(run, JOB, ended(0, 70, said("Internal")), ended(1, 70, said("Internal"))), NOW, SETTINGS)
    assert plan.message.startswith("it broke (after 0 of runPolicy.maxRestarts = 0 restarts). Remedy: ")
