"""decide(): every rule of the state machine as one row. Queues, failures and pauses have their own files."""

from dataclasses import replace

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.firstseen import held_up_seen
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from lora_operator.state.reports import Refusal, Reports
from lora_operator.state.runtimes import build_snapshot
from lora_operator.status.compute import compute_status
from lora_operator.watched.views import JobView
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
    published,
    running,
    said,
    seen,
    sighted,
    waiting,
)
from tests.unit.operator.cases import (
    CLEANED_UP,
    FAILED_ONCE,
    JOB,
    LONG_GONE,
    NOTHING,
    QUEUE,
    REFERENCE,
    RUNTIME,
    SETTINGS,
    STARTED,
    SUSPENDED,
    Case,
    check,
)

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
        {"phase": Phase.STARTING, "reason": "ImagePullFailed", "requeue_after": 600.0, "failure": None},
        marks={ConditionType.RUNNING: (False, "ImagePullFailed")},
    ),
    Case(
        "an image that cannot be pulled for long ends the run",
        seen(
            a_run(status=STARTED), JOB, waiting(0, "ImagePullBackOff"), waiting(1, "ContainerCreating"),
            reports=sighted(held_up_seen(waiting(0, ""), "ImagePullFailed"), 601),
        ),
        {"phase": Phase.FAILED, "ended": True},
        FailureClass.IMAGE_PULL_FAILED,
    ),
    Case(
        "an image that fails once after a long wait for a node is no end",
        seen(a_run(status=STARTED), JOB, waiting(0, "ErrImagePull", "429", created=ago(9000)), running(1)),
        {"phase": Phase.STARTING, "requeue_after": 600.0},
    ),
    Case(
        "a sidecar before the trainer that does not come up ends the attempt, and is tried again",
        seen(
            a_run(status=STARTED), JOB, waiting(0, "CrashLoopBackOff", init_container="istio-proxy"), running(1),
            reports=sighted(held_up_seen(waiting(0, ""), "PodLost"), 601),
        ),
        {"phase": Phase.RESTARTING, "charged": False},
        FailureClass.POD_LOST,
    ),
    Case(
        "a missing Secret ends the run after a while",
        seen(
            a_run(status=STARTED), JOB, waiting(0, "CreateContainerConfigError", 'secret "x" not found'), running(1),
            reports=sighted(held_up_seen(waiting(0, ""), "PodNotStarted"), 601),
        ),
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
        seen(a_run(status=STARTED), JOB, reports=Reports(refusal=Refusal("exceeded quota: few", ago(5e5)))),
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
    # The end
    Case(
        "what a run was made of is deleted after a while",
        seen(
            a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60}),
            a_job(failed_indexes=frozenset({0, 1})), ended(0), ended(1),
        ),
        {"clean_up": True, "delete_run": False, "delete": None, "stop": None},
        marks={ConditionType.CLEANED_UP: (True, "TimeToLiveOver")},
    ),
    Case(
        "though its Job is gone: the other children are not watched",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60})),
        {"clean_up": True},
    ),
    Case(
        "but the pods are ended first: the NetworkPolicy goes with the rest",
        seen(
            a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60}),
            JOB, running(0), ended(1),
        ),
        {"clean_up": False, "delete": JOB},
    ),
    Case(
        "also where the run itself is to go",
        seen(
            a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60, "ttlDeletes": "run"}),
            JOB, running(0), ended(1),
        ),
        {"delete_run": False, "delete": JOB},
    ),
    Case(
        "and nothing else goes while they end",
        seen(
            a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60}),
            running(0, deleting_at=ago(-5)), ended(1, gone=True),
        ),
        {"clean_up": False, "delete": None, "requeue_after": 25.0},
    ),
    Case(
        "but no longer than the kubelet has to end them",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 60}), running(0, deleting_at=ago(30))),
        {"clean_up": True},
    ),
    Case(
        "and that is it",
        seen(a_run(status=CLEANED_UP, runPolicy={"ttlSecondsAfterFinished": 60})),
        {**NOTHING, "clean_up": False},
    ),
    Case(
        "unless a Job is seen after all",
        seen(a_run(status=CLEANED_UP, runPolicy={"ttlSecondsAfterFinished": 60}), JOB),
        {"clean_up": True},
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
        "a Job that is gone changes nothing about the time",
        seen(a_run(status=LONG_GONE, runPolicy={"ttlSecondsAfterFinished": 500})),
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
    check(case)


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
