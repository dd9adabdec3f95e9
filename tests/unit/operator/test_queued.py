"""decide() for a run in a queue: it waits for quota, gets it, and loses it."""

from dataclasses import replace

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.firstseen import suspended_seen
from lora_operator.state.reports import Refusal, Reports
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_run,
    ago,
    ended,
    published,
    running,
    said,
    seen,
    taken,
)
from tests.unit.operator.cases import (
    FAILED_ONCE,
    JOB,
    QUEUE,
    QUEUED,
    RESUMED,
    STARTED,
    SUSPENDED,
    SWITCHED_OFF,
    TAKEN,
    TAKEN_PODS,
    WAITS,
    Case,
    check,
)

CASES = [
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
        seen(a_run(status=STARTED), QUEUED, taken(0), taken(1), reports=Reports(queue=WAITS)),
        {"phase": Phase.QUEUED, "reason": "JobSuspended", "failure": None},
    ),
    Case(
        "why it was suspended is read before anything is said",
        seen(a_run(status=STARTED), QUEUED, taken(0), taken(1), reports=Reports(seen={suspended_seen(QUEUED): ago(2)})),
        {"phase": None, "failure": None, "requeue_after": 3.0},
    ),
    Case(
        "if nobody can read it, it is said without",
        seen(a_run(status=STARTED), QUEUED, taken(0), taken(1), reports=Reports(seen={suspended_seen(QUEUED): ago(5)})),
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
            reports=Reports(refusal=Refusal("violates PodSecurity", ago(5))),
        ),
        {"phase": Phase.STARTING, "reason": "PodNotStarted", "failure": None, "requeue_after": 595.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_in_a_queue(case: Case) -> None:
    check(case)
