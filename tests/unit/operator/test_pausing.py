"""decide() between attempts: the pause before a restart, and runs that are suspended and go on."""

import pytest

from lora_api import ConditionType, FailureClass, Phase
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_run,
    ago,
    ended,
    failure,
    published,
    running,
    said,
    seen,
    stamp,
)
from tests.unit.operator.cases import (
    FAILED_ONCE,
    JOB,
    STARTED,
    SUSPENDED,
    SUSPENDED_ONCE,
    Case,
    check,
)

CASES = [
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
        "the pause doubles with each failure",
        seen(
            a_run(status={"attempt": 3, "recentFailures": 2}), a_job(3),
            *(ended(index, 70, said("Internal"), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.RESTARTING, "backoff": 40.0},
        FailureClass.INTERNAL,
    ),
    Case(
        "and so it does where an older operator has counted those that are charged only",
        seen(
            a_run(status={"attempt": 3, "chargedRestarts": 2}), a_job(3),
            *(ended(index, 70, said("Internal"), attempt=3, job_uid="job-3") for index in (0, 1)),
        ),
        {"phase": Phase.RESTARTING, "backoff": 40.0},
        FailureClass.INTERNAL,
    ),
    Case(
        "a restart that is not charged has a pause too",
        seen(a_run(status=STARTED), JOB, *(ended(index, 75, said("Checkpointed")) for index in (0, 1))),
        {"phase": Phase.RESTARTING, "backoff": 10.0},
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
        {"launch": None, "requeue_after": 5.0},
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
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pause(case: Case) -> None:
    check(case)
