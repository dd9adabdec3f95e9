"""decide(): what happens before the first attempt, one row a rule."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_api import ConditionType, Failure, FailureClass, LoRAFineTune, Phase
from lora_operator.diagnosis.firstseen import held_up_seen, run_seen
from lora_operator.lifecycle.decide import decide
from lora_operator.lifecycle.queued import describe_queue
from lora_operator.settings import Settings
from lora_operator.state.reports import Reports
from lora_operator.state.runtimes import build_snapshot
from lora_operator.state.workload import QueueReport
from lora_operator.status.compute import compute_status
from lora_operator.status.events import compute_events
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator import cases
from tests.unit.operator.builders import (
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
    settled,
    sighted,
    stamp,
    waiting,
)

SETTINGS = Settings(failure_grace=20.0, start_timeout=600.0, preflight_timeout=300.0)
JOB = a_preflight()
NO_IMAGE = held_up_seen(waiting(0, ""), "ImagePullFailed")
PASSED = ConditionType.PREFLIGHT_PASSED
CHECKING = (False, "Preflight")
HELD = a_preflight(suspended=True, was_suspended=True)
RUNTIME = a_runtime(limits={"maxNodes": 2})


@dataclass(frozen=True)
class Case(cases.Case):
    """``mark``: the condition PreflightPassed, or that nothing is said of it."""

    mark: tuple[bool, str] | None = None


def of(job: JobView, pod: PodView) -> PodView:
    """``pod`` as the pod of ``job``."""
    return replace(pod, name=f"{job.name}-0", job_uid=job.uid, attempt=0)


def failed_before(*classes: str, **status: Any) -> LoRAFineTune:
    failures = [failure(0, one) for one in classes]
    return a_run(status={"failedPreflights": len(classes), "failures": failures, **status})


CASES = [
    Case(
        "a new run is looked at before anything else",
        seen(a_run()),
        {"launch_preflight": 1, "launch": None, "phase": Phase.PREFLIGHT, "attempt": 0}, mark=CHECKING,
    ),
    Case(
        "one that Kueue holds back is put into the queue of its run",
        seen(a_run(runPolicy={"queueName": "team-a"}), HELD),
        {"phase": Phase.PREFLIGHT, "enqueue": HELD}, mark=(False, "Queued"),
    ),
    Case(
        "once",
        seen(a_run(runPolicy={"queueName": "team-a"}), replace(HELD, queue="default")),
        {"enqueue": None}, mark=(False, "Queued"),
    ),
    Case(
        "a run without a queue has none to put it into",
        seen(a_run(), HELD, reports=Reports(queue=QueueReport(workload="w"))),
        {"enqueue": None, "message": describe_queue(HELD.name, QueueReport(workload="w"))}, mark=(False, "Queued"),
    ),
    Case(
        "one that Kueue holds back waits, with Kueue's words",
        seen(
            a_run(), a_preflight(suspended=True, was_suspended=True),
            reports=Reports(queue=QueueReport(workload="w", queue="default", message="no quota", position=1)),
        ),
        {"phase": Phase.PREFLIGHT, "message": "Number 1 in queue default: no quota", "delete": None},
        mark=(False, "Queued"),
    ),
    Case(
        "its runtime is taken first",
        seen(a_run(), runtime=RUNTIME),
        {"runtime": build_snapshot(RUNTIME), "launch_preflight": None, "phase": Phase.PENDING},
    ),
    Case(
        "a limit of the runtime is seen before any pod",
        seen(a_run(parallelism={"nodes": 4, "gpusPerNode": 0}), runtime=RUNTIME),
        {"launch_preflight": None, "phase": Phase.FAILED, "ended": True}, FailureClass.RUNTIME_REFUSED,
        mark=(False, "RuntimeRefused"),
    ),
    Case(
        "one that is under way without a runtime takes none",
        seen(a_run(), JOB, runtime=RUNTIME), {"runtime": None}, mark=CHECKING,
    ),
    Case(
        "nor does one that follows another",
        seen(failed_before("PodLost"), runtime=RUNTIME), {"runtime": None, "launch_preflight": 2}, mark=CHECKING,
    ),
    Case(
        "nor does a run that has passed",
        seen(a_run(status={"conditions": [condition("PreflightPassed")]}), runtime=RUNTIME),
        {"runtime": None, "launch": 1},
    ),
    Case("a run that is created suspended waits", seen(a_run(runPolicy={"suspend": True})), {
        "launch_preflight": None, "launch": None, "phase": Phase.SUSPENDED,
    }),
    Case("a suspension ends the preflight", seen(a_run(runPolicy={"suspend": True}), JOB, of(JOB, running())), {
        "delete": JOB, "phase": None,
    }),
    Case("its Job is there, and no pod yet", seen(a_run(), JOB), {"launch_preflight": None}, mark=CHECKING),
    Case(
        "it runs, and has an end to run to",
        seen(a_run(), JOB, of(JOB, running()), reports=sighted(run_seen(JOB), 100)),
        {"requeue_after": 200.0}, mark=CHECKING,
    ),
    Case(
        "it does not end",
        seen(a_run(), JOB, of(JOB, running()), reports=sighted(run_seen(JOB), 301)),
        {"phase": Phase.PREFLIGHT, "charged": True},
        FailureClass.STALLED, mark=(False, "Stalled"),
    ),
    Case(
        "waiting for a node does not count",
        seen(a_run(), JOB, of(JOB, a_pod(created=ago(9000)))), {"requeue_after": None}, mark=CHECKING,
    ),
    Case(
        "no node takes it",
        seen(a_run(), JOB, of(JOB, a_pod(unscheduled_reason="Unschedulable", unscheduled_message="no room"))),
        {"phase": Phase.PREFLIGHT, "requeue_after": None}, mark=(False, "Unschedulable"),
    ),
    Case(
        "its image is not there",
        seen(a_run(), JOB, of(JOB, waiting(0, "ImagePullBackOff")), reports=sighted(NO_IMAGE, 590)),
        {"requeue_after": 10.0},
        mark=(False, "ImagePullFailed"),
    ),
    Case(
        "its image has not been there for long",
        seen(a_run(), JOB, of(JOB, waiting(0, "ImagePullBackOff")), reports=sighted(NO_IMAGE, 601)),
        {"phase": Phase.FAILED, "ended": True}, FailureClass.IMAGE_PULL_FAILED, mark=(False, "ImagePullFailed"),
    ),
    Case(
        "it passed", seen(a_run(), JOB, of(JOB, ended(0, 0, settled()))),
        {"phase": Phase.PREFLIGHT, "launch": None, "ended": False}, mark=(True, "PreflightPassed"),
    ),
    Case(
        "it passed while its Job is deleted",
        seen(a_run(), replace(JOB, deleting=True), of(JOB, ended(0, 0, settled()))), mark=(True, "PreflightPassed"),
    ),
    Case(
        "a record is bad: the run ends, and no attempt was made",
        seen(a_run(), JOB, of(JOB, ended(0, 65, said("BadData", "record 7: no completion")))),
        {"phase": Phase.FAILED, "launch": None, "ended": True, "attempt": 0}, FailureClass.BAD_DATA,
        mark=(False, "BadData"),
    ),
    Case(
        "the store does not answer: another one follows, and does not count",
        seen(a_run(), JOB, of(JOB, ended(0, 74, said("StoreUnavailable")))),
        {"phase": Phase.PREFLIGHT, "charged": False, "ended": False, "backoff": 10.0}, FailureClass.STORE_UNAVAILABLE,
        mark=(False, "StoreUnavailable"),
    ),
    Case(
        "no restarts are left",
        seen(
            failed_before("Internal", chargedRestarts=1).model_copy(
                update={"spec": a_run(runPolicy={"maxRestarts": 1}).spec}
            ),
            a_preflight(2), of(a_preflight(2), ended(0, 70, said("Internal"))),
        ),
        {"phase": Phase.FAILED, "ended": True}, FailureClass.INTERNAL, mark=(False, "Internal"),
    ),
    Case(
        "the store has been away for an hour, and was never seen",
        seen(
            failed_before("StoreUnavailable", failingSince=stamp(ago(3600))), a_preflight(2),
            of(a_preflight(2), ended(0, 74, said("StoreUnavailable"))),
        ),
        {"phase": Phase.FAILED, "ended": True}, FailureClass.STORE_UNAVAILABLE, mark=(False, "StoreUnavailable"),
    ),
    Case(
        "but that its pod waited for a node is no time of that",
        seen(
            failed_before("StoreUnavailable", failingSince=stamp(ago(7200))), a_preflight(2, created=ago(7000)),
            of(a_preflight(2), ended(0, 74, said("StoreUnavailable"), scheduled_at=ago(300))),
        ),
        {"phase": Phase.PREFLIGHT, "ended": False}, FailureClass.STORE_UNAVAILABLE, mark=(False, "StoreUnavailable"),
    ),
    Case(
        "evicted: another one follows, and does not count",
        seen(a_run(), JOB, of(JOB, ended(0, 137, disruption="EvictionByEvictionAPI"))),
        {"phase": Phase.PREFLIGHT, "charged": False, "backoff": 10.0}, FailureClass.EVICTED, mark=(False, "Evicted"),
    ),
    Case(
        "evicted for a day",
        seen(failed_before(*["Evicted"] * 3, failingSince=stamp(ago(86400))), a_preflight(4), of(
            a_preflight(4), ended(0, 137, disruption="EvictionByEvictionAPI"))),
        {"phase": Phase.FAILED, "ended": True}, FailureClass.NO_PROGRESS, mark=(False, "NoProgress"),
    ),
    Case(
        "it ended well and settled nothing, as an older trainer would",
        seen(a_run(), JOB, of(JOB, ended(0, 0, "", reason="Completed"))),
        {"phase": Phase.PREFLIGHT, "charged": True}, FailureClass.INTERNAL, mark=(False, "Internal"),
    ),
    Case(
        "the Job of one that failed goes first",
        seen(failed_before("Evicted"), JOB), {"delete": JOB, "launch_preflight": None, "phase": None},
    ),
    Case("then the next one is made", seen(failed_before("Evicted")), {"launch_preflight": 2}, mark=CHECKING),
    Case(
        "but not before its time",
        seen(failed_before("StoreUnavailable", retryTime=stamp(ago(-7)))),
        {"launch_preflight": None, "requeue_after": 7.0, "phase": None},
    ),
    Case(
        "somebody deletes its Job", seen(a_run(), replace(JOB, deleting=True), of(JOB, running())),
        {"launch_preflight": None, "failure": None}, mark=CHECKING,
    ),
    Case(
        "after it the first attempt",
        seen(a_run(status={"conditions": [condition("PreflightPassed")]}), JOB, of(JOB, ended(0, 0, settled()))),
        {"launch": 1, "launch_preflight": None, "attempt": 1, "phase": Phase.STARTING},
    ),
    Case(
        "its Job is gone later: nobody minds",
        seen(a_run(status={"attempt": 1, "conditions": [condition("PreflightPassed")]}), a_job()),
        {"launch_preflight": None, "failure": None, "phase": Phase.STARTING},
    ),
    Case(
        "a run that began under an operator without preflight goes on",
        seen(a_run(), a_job(), running(0), running(1)), {"launch_preflight": None, "phase": Phase.RUNNING},
    ),
    Case(
        "what preflights have taken of the day counts for attempts",
        seen(
            failed_before(
                "Evicted", "Evicted", attempt=2, conditions=[condition("PreflightPassed"), condition("Scheduled")],
                failingSince=stamp(ago(86400)),
            ),
            a_job(2), ended(0, 137, attempt=2, disruption="EvictionByEvictionAPI"),
            ended(1, 137, attempt=2, disruption="EvictionByEvictionAPI"),
        ),
        {"phase": Phase.FAILED}, FailureClass.NO_PROGRESS,
    ),
    Case(
        "after a run that failed in it, its pod is ended",
        seen(failed_before("ImagePullFailed", conditions=[condition("Failed")]), JOB, of(JOB, a_pod())),
        {"delete": JOB},
    ),
    Case(
        "after a run that failed in it, its log is kept",
        seen(failed_before("BadData", conditions=[condition("Failed")]), JOB, of(JOB, ended(0, 65))),
        {"delete": None, "stop": None},
    ),
    Case(
        "an old run that is cleared up goes with its preflight",
        seen(
            failed_before("BadData", conditions=[condition("Failed")], completionTime=stamp(ago(100))).model_copy(
                update={"spec": a_run(runPolicy={"ttlSecondsAfterFinished": 60}).spec}
            ),
            JOB,
        ),
        {"clean_up": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decide(case: Case) -> None:
    plan = cases.check(case, SETTINGS)
    mark = plan.conditions.get(PASSED)
    assert (None if mark is None else (mark.value, mark.reason)) == case.mark
    assert plan.failure is None or plan.failure.attempt == case.want.get("attempt", plan.failure.attempt)


def test_what_it_settled_is_put_on_record_and_stays() -> None:
    pin = {"uri": "s3://models/base", "digest": "sha256:" + "b" * 64, "files": 3, "sizeBytes": 10}
    outcome = {"pins": {"baseModel": pin}, "plan": {"microBatchSize": 2, "processes": 2, "shardSize": 2}}
    run = a_run()
    plan = decide(seen(run, JOB, of(JOB, ended(0, 0, settled(**outcome)))), NOW, SETTINGS)
    status = compute_status(run, plan, Reports(), NOW)
    assert status.pins is not None
    assert status.pins.to_wire() == outcome["pins"]
    assert status.plan is not None
    assert status.plan.micro_batch_size == 2
    run = run.model_copy(update={"status": status})
    later = compute_status(run, decide(seen(run, JOB), NOW, SETTINGS), Reports(), NOW)
    assert (later.pins, later.plan, later.attempt) == (status.pins, status.plan, 1)
    assert (later.start_time, status.start_time) == (NOW, None)


def test_preflights_that_failed_are_counted() -> None:
    run = a_run()
    plan = decide(seen(run, JOB, of(JOB, ended(0, 70, said("Internal")))), NOW, SETTINGS)
    status = compute_status(run, plan, Reports(), NOW)
    assert (status.failed_preflights, status.charged_restarts, status.attempt) == (1, 1, 0)
    assert [one.attempt for one in status.failures] == [0]
    assert status.retry_time == ago(-10)


def test_a_published_adapter_is_no_preflight() -> None:
    plan = decide(seen(a_run(), JOB, of(JOB, ended(0, 0, published()))), NOW, SETTINGS)
    assert (plan.passed, plan.adapter) == (None, None)


def test_events_tell_it_once_each() -> None:
    run, told = a_run(), []
    seconds = a_preflight(2)
    for parts in (
        (),
        (JOB, of(JOB, running())),
        (JOB, of(JOB, ended(0, 74, said("StoreUnavailable", "no answer")))),
        (),
        (seconds, of(seconds, ended(0, 74, said("StoreUnavailable", "no answer")))),
        (),
        (a_preflight(3), of(a_preflight(3), ended(0, 0, settled()))),
        (),
    ):
        plan = decide(seen(run, *parts), NOW, SETTINGS)
        new = compute_status(run, plan, Reports(), NOW).model_copy(update={"retry_time": None})
        told += [f"{event.reason} {event.about}" for event in compute_events(run.status, new)]
        run = run.model_copy(update={"status": new})
    assert told == [
        "Preflight pre1",
        "StoreUnavailable pre1",
        "StoreUnavailable pre2",
        "PreflightPassed pre3",
        "Started 1",
    ]


def test_the_failure_of_a_preflight_names_no_rank() -> None:
    observed = seen(a_run(), JOB, of(JOB, ended(0, 66, said("ModelNotFound"))))
    found = decide(observed, NOW, SETTINGS).failure
    assert isinstance(found, Failure)
    assert (found.rank, found.pod, found.exit_code) == (None, "tickets-pre1-0", 66)
