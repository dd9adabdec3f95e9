"""decide(): pods that nobody owns, copies of pods, and sidecars that run on."""

from typing import Any

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.firstseen import ORPHANS
from lora_operator.lifecycle.decide import decide
from lora_operator.watched.views import PodView
from tests.unit.operator.builders import (
    ADAPTER,
    NOW,
    a_job,
    a_preflight,
    a_run,
    ago,
    condition,
    ended,
    published,
    running,
    said,
    seen,
    sighted,
    stamp,
)
from tests.unit.operator.cases import FAILED_ONCE, JOB, LONG_GONE, SETTINGS, STARTED, SUSPENDED, Case, check, value_of


def orphan(index: int, attempt: int = 1, **changes: Any) -> PodView:
    """A pod that trains on though its Job is gone."""
    return running(index, attempt, **{"orphaned": True, "run_uid": "run-uid", **changes})


def orphan_published(**changes: Any) -> PodView:
    return ended(0, 0, published(), **{"orphaned": True, "run_uid": "run-uid", **changes})


CASES = [
    # Pods whose Job was deleted with --cascade=orphan
    Case(
        "orphans hold up the next attempt, and are named",
        seen(
            a_run(status=FAILED_ONCE),
            orphan(0),
            orphan(1),
            reports=sighted(ORPHANS, 100),
        ),
        {
            "launch": None,
            "phase": Phase.RESTARTING,
            "attempt": 1,
            "reason": "OrphanedPods",
            "requeue_after": 20.0,
            "message": "Pods tickets-1-0, tickets-1-1 are still there though their Job was deleted (orphaned), and "
            "may train on and write checkpoints. The next attempt waits for them, for 600 s at most. Remedy: kubectl "
            "delete pod tickets-1-0 tickets-1-1; or let them train to their end: what they publish counts.",
        },
        marks={ConditionType.RUNNING: (False, "OrphanedPods")},
    ),
    Case(
        "but not for ever",
        seen(a_run(status=FAILED_ONCE), orphan(0), orphan(1), reports=sighted(ORPHANS, 600)),
        {"launch": 2},
    ),
    Case(
        "those of an earlier run too",
        seen(a_run(), orphan(0, run_uid="earlier"), reports=sighted(ORPHANS, 100)),
        {"launch": None, "phase": Phase.PENDING, "reason": "OrphanedPods", "attempt": 0},
    ),
    Case(
        "pods whose owner is gone are about to be deleted",
        seen(a_run(status=FAILED_ONCE), running(0), reports=sighted(ORPHANS, 19)),
        {"launch": None, "phase": None, "requeue_after": 20.0},
    ),
    Case(
        "where they are not they are named",
        seen(a_run(status=FAILED_ONCE), running(0), reports=sighted(ORPHANS, 21)),
        {"launch": None, "reason": "OrphanedPods"},
    ),
    Case(
        "an orphan that has ended holds nobody up",
        seen(a_run(status=FAILED_ONCE), ended(0, 70, orphaned=True), ended(1, 70, orphaned=True)),
        {"launch": 2},
    ),
    Case(
        "what they publish counts",
        seen(a_run(status=FAILED_ONCE), orphan_published(), orphan(1), reports=sighted(ORPHANS, 100)),
        {"phase": Phase.SUCCEEDED, "attempt": 1, "ended": True},
    ),
    Case(
        "also beside the next attempt, which is ended then",
        seen(a_run(status={**FAILED_ONCE, "attempt": 2}), a_job(2), orphan_published(), running(0, 2), running(1, 2)),
        {"phase": Phase.SUCCEEDED, "attempt": 2, "ended": True},
    ),
    Case(
        "what those of an earlier run publish does not",
        seen(a_run(status=FAILED_ONCE), orphan_published(run_uid="earlier")),
        {"launch": 2},
    ),
    Case(
        "nor what an orphan of a preflight says",
        seen(a_run(status=FAILED_ONCE), orphan(0, attempt=0)),
        {"launch": 2},
    ),
    Case(
        "a copy of a pod holds nobody up",
        seen(a_run(status=FAILED_ONCE), running(0, job_uid="", orphaned=True)),
        {"launch": 2},
    ),
    # Sidecars
    Case(
        "a preflight that has passed and runs on by a sidecar is ended",
        seen(
            a_run(status={"conditions": [condition("PreflightPassed")]}),
            a_preflight(),
            ended(0, 0, job_uid="pre-1", phase="Running", sidecar_runs=True),
        ),
        {"delete": a_preflight(), "launch": None},
    ),
    Case(
        "one without a sidecar ends by itself, a moment after its container, and is kept for its log",
        seen(
            a_run(status={"conditions": [condition("PreflightPassed")]}),
            a_preflight(),
            ended(0, 0, job_uid="pre-1", phase="Running"),
        ),
        {"delete": None, "launch": 1},
    ),
    Case(
        "so do the pods of a run that has failed",
        seen(
            a_run(status={"attempt": 1, "completionTime": stamp(ago(1)), "conditions": [condition("Failed")]}),
            JOB,
            ended(0, 65, said("BadData"), phase="Running"),
            ended(1, 73, phase="Failed"),
        ),
        {"delete": None, "stop": None},
    ),
    Case(
        "but not for ever",
        seen(
            a_run(status={"attempt": 1, "completionTime": stamp(ago(500)), "conditions": [condition("Failed")]}),
            JOB,
            ended(0, 65, said("BadData"), phase="Running"),
            ended(1, 73, phase="Failed"),
        ),
        {"delete": JOB},
    ),
    Case(
        "a gang that has done its work succeeds, though sidecars run on",
        seen(
            a_run(status=STARTED),
            JOB,
            ended(0, 0, published(), phase="Running"),
            ended(1, 0, phase="Running"),
        ),
        {"phase": Phase.SUCCEEDED, "ended": True},
    ),
    Case(
        "one that failed is judged, though sidecars run on",
        seen(
            a_run(status=STARTED),
            JOB,
            ended(0, 73, said("PeerLost"), phase="Running"),
            ended(1, 74, said("StoreUnavailable"), phase="Running"),
        ),
        {"phase": Phase.RESTARTING},
        FailureClass.STORE_UNAVAILABLE,
    ),
    Case(
        "and its pods are ended with the run",
        seen(
            a_run(status={**LONG_GONE, "conditions": [condition("Complete")], "adapter": ADAPTER}),
            JOB,
            ended(0, 0, published(), phase="Running"),
            ended(1, 0, phase="Succeeded"),
        ),
        {"delete": JOB},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decide(case: Case) -> None:
    check(case)


NAMED = "Pod tickets-1-0 is still there though their Job was deleted (orphaned), and may train on"


@pytest.mark.parametrize(
    "observed",
    [
        seen(a_run(status={**FAILED_ONCE, "attempt": 2}), a_job(2), orphan(0), reports=sighted(ORPHANS, 900)),
        seen(
            a_run(status={**FAILED_ONCE, "attempt": 2}), a_job(2), orphan(0), running(0, 2), running(1, 2),
            reports=sighted(ORPHANS, 900),
        ),
        seen(a_run(status=FAILED_ONCE, runPolicy=SUSPENDED), orphan(0), reports=sighted(ORPHANS, 900)),
    ],
    ids=["the next attempt starts", "it runs", "the run is suspended"],
)  # fmt: skip
def test_orphans_that_were_let_go_are_still_named(observed: Any) -> None:
    """Two attempts of one run may write checkpoints then: not without a word."""
    assert NAMED in decide(observed, NOW, SETTINGS).message


def test_many_orphans_are_counted() -> None:
    pods = [orphan(index) for index in range(12)]
    message = decide(seen(a_run(status=FAILED_ONCE), *pods, reports=sighted(ORPHANS, 1)), NOW, SETTINGS).message
    assert "tickets-1-4 and 7 more are still there" in message
    assert "tickets-1-5" not in message


@pytest.mark.parametrize(
    ("pod", "over", "want"),
    [
        (orphan(0), 100, {"clean_up": False, "requeue_after": 500.0}),
        (orphan(0), 600, {"clean_up": True}),
        (running(0, job_uid="", orphaned=True), 0, {"clean_up": True}),
    ],
    ids=["an orphan is waited for", "but not for ever", "a copy is not"],
)
def test_what_a_run_was_made_of_goes_after_its_time(pod: PodView, over: float, want: dict[str, Any]) -> None:
    """Without the NetworkPolicy anybody could speak to pods that live on."""
    run = a_run(status={**LONG_GONE, "completionTime": stamp(ago(9000))}, runPolicy={"ttlSecondsAfterFinished": 60})
    plan = decide(seen(run, pod, reports=sighted(ORPHANS, over)), NOW, SETTINGS)
    assert {name: value_of(plan, name) for name in want} == want


def test_a_copy_of_a_pod_does_not_take_its_place() -> None:
    """The Job controller takes one for its own that has its labels, and takes the younger of the two away."""
    copy = running(0, name="debug", uid="debug", created=ago(1), copied=True)
    observed = seen(a_run(status=STARTED), JOB, running(0), copy, running(1))
    assert [pod.name for pod in observed.gang(JOB)] == ["tickets-1-0", "tickets-1-1"]
