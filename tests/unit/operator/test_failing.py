"""decide() for an attempt that fails: what is charged, what follows, and when to wait for last words."""

from typing import Any

import pytest

from lora_api import RULES, ConditionType, FailureClass, Phase, build_run_spec
from lora_operator.lifecycle.decide import decide
from lora_operator.state.reports import Reports
from lora_operator.status.compute import compute_status
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_run,
    ago,
    condition,
    ended,
    running,
    said,
    seen,
    stamp,
)
from tests.unit.operator.cases import FAILED_ONCE, IMPATIENT, JOB, NOTHING, SETTINGS, STARTED, Case, check

CASES = [
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
        "restarts that are not charged come to an end after a day without a newer checkpoint",
        seen(
            a_run(status={
                "attempt": 4, "failingSince": stamp(ago(86_400)), "conditions": [condition("Scheduled")]
            }),
            a_job(4),
            *(ended(index, 75, said("Checkpointed"), attempt=4, job_uid="job-4") for index in (0, 1)),
        ),
        {"phase": Phase.FAILED},
        FailureClass.NO_PROGRESS,
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
        {"launch": None, "phase": None, "requeue_after": 5.0},
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
            JOB, running(0), running(1), reports=Reports(heard_at=ago(60), log_read_at=NOW),
        ),
        {"phase": Phase.RESTARTING, "charged": True},
        FailureClass.STALLED,
    ),
    Case(
        "but not before its log was read once more",
        seen(
            a_run(status={**STARTED, "conditions": [condition("Running", at=ago(900))]}, runPolicy=IMPATIENT),
            JOB, running(0), running(1), reports=Reports(heard_at=ago(70), log_read_at=ago(11)),
        ),
        {"phase": Phase.RUNNING, "requeue_after": 1.0},
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
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_attempt_that_fails(case: Case) -> None:
    check(case)


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
        assert plan.failed is not None
        assert plan.failed.charged == (want == FailureClass.PEER_LOST)


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
    assert plan.failed is not None
    assert (plan.failed.micro_batch_size, plan.ended, plan.failed.charged) == (want, want is None, False)
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
    assert plan.failed is not None
    assert (plan.phase, plan.failed.micro_batch_size) == (Phase.FAILED, None)


@pytest.mark.parametrize("failure_class", list(FailureClass))
def test_the_table_says_what_follows_a_failure(failure_class: FailureClass) -> None:
    rule = RULES[failure_class]
    pods = [ended(index, 70, said(str(failure_class), "record 7 is broken.")) for index in (0, 1)]
    plan = decide(seen(a_run(status=STARTED), JOB, *pods), NOW, SETTINGS)
    assert plan.failed is not None
    failure = plan.failed.failure
    assert (failure.failure_class, failure.remedy) == (failure_class, rule.remedy)
    assert (plan.phase == Phase.RESTARTING, plan.ended) == (rule.retried, not rule.retried)
    assert plan.failed.charged == (rule.charged and rule.retried)
    assert plan.message == f"record 7 is broken. Remedy: {rule.remedy}"


def test_a_refused_restart_says_which_limit_refuses_it() -> None:
    run = a_run(status={"attempt": 1}, runPolicy={"maxRestarts": 0})
    plan = decide(seen(run, JOB, ended(0, 70, said("Internal")), ended(1, 70, said("Internal"))), NOW, SETTINGS)
    assert plan.message.startswith("it broke (after 0 of runPolicy.maxRestarts = 0 restarts). Remedy: ")
