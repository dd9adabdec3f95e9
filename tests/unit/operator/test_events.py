"""What people read of a change of status: the Events of ``kubectl describe``."""

from typing import Any

import pytest

from lora_api import LoRAFineTuneStatus
from lora_operator.status.events import compute_events
from tests.unit.operator.builders import NOW, a_run, condition, failure, stamp

ENDED = {"attempt": 2, "phase": "Failed", "completionTime": stamp(NOW)}


def said(kind: str, message: str, status: str = "True", reason: str = "Because") -> dict[str, Any]:
    return {**condition(kind, status, reason), "message": message}


def failed(attempt: int) -> dict[str, Any]:
    return {**failure(attempt, "NodeLost"), "message": "node gpu-7 is lost"}


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        (ENDED, {"attempt": 2, "phase": "Pending", "observedRetry": 3}, [
            "Normal Retried 2.r3: runPolicy.retry was raised to 3: attempt 3 goes on from the last checkpoint",
        ]),
        ({**ENDED, "attempt": 0}, {"phase": "Pending", "observedRetry": 1, "retriedAttempts": 0}, [
            "Normal Retried pre1.r1.r1: runPolicy.retry was raised to 1: it begins again",
        ]),
        ({**ENDED, "phase": "Succeeded"}, {"attempt": 2, "phase": "Succeeded", "observedRetry": 1}, [
            "Warning RetryIgnored 2.r1: runPolicy.retry is 1: the run has succeeded, and is not tried again",
        ]),
        ({"attempt": 2}, {"attempt": 2, "observedRetry": 1}, []),
        (ENDED | {"observedRetry": 1}, {**ENDED, "observedRetry": 1}, []),
        ({}, {"phase": "Preflight", "conditions": [said("PreflightPassed", "Checking", "Unknown")]}, [
            "Normal Preflight pre1: Checking",
        ]),
        ({"failedPreflights": 1}, {"failedPreflights": 1, "conditions": [said("PreflightPassed", "All is well")]}, [
            "Normal PreflightPassed pre2: All is well",
        ]),
        ({"attempt": 1}, {"attempt": 2, "phase": "Starting"}, ["Normal Started 2: Attempt 2: created its pods"]),
        ({}, {"attempt": 1, "phase": "Queued", "conditions": [said("Running", "In queue gpus", "False")]}, [
            "Normal Started 1: Attempt 1: created its Job",
            "Normal Queued 1: Attempt 1: In queue gpus",
        ]),
        (
            {"attempt": 1, "phase": "Running"},
            {"attempt": 1, "phase": "Queued", "preemptions": 1,
             "conditions": [said("Running", "Kueue took its quota back", "False")]},
            ["Warning Preempted 1.q1: Attempt 1: Kueue took its quota back"],
        ),
        ({"attempt": 1}, {"attempt": 1, "phase": "Running", "conditions": [said("Running", "")]}, [
            "Normal Running 1: Attempt 1: every pod runs",
        ]),
        ({"attempt": 1}, {"attempt": 1, "phase": "Restarting", "failures": [failed(1)]}, [
            "Warning NodeLost 1: Attempt 1 failed, and another follows: node gpu-7 is lost",
        ]),
        ({}, {"phase": "Preflight", "failedPreflights": 1, "failures": [failed(0)],
              "conditions": [said("PreflightPassed", "Again", "Unknown")]}, [
            "Normal Preflight pre2: Again",
            "Warning NodeLost pre1: Preflight failed, and another follows: node gpu-7 is lost",
        ]),
        ({"attempt": 1}, {"attempt": 1, "suspendedAttempt": 1}, [
            "Normal Suspended 1: Attempt 1: runPolicy.suspend ends its pods once they have saved a checkpoint",
        ]),
        ({"attempt": 1}, {"attempt": 1, "phase": "Failed", "reason": "NodeLost", "failures": [failed(1)]}, [
            "Warning NodeLost 1: Attempt 1 ended the run. The node of a pod stopped answering. The condition "
            "Stalled and status.failures say more",
        ]),
        ({}, {"phase": "Failed"}, [
            "Warning Failed pre1: What comes before the first attempt ended the run. The condition Stalled and "
            "status.failures say more",
        ]),
        ({"attempt": 1}, {"attempt": 1, "phase": "Succeeded", "conditions": [said("Complete", "v3 is in the store"),
                                                                          said("Published", "")]}, [
            "Normal Succeeded 1: v3 is in the store",
        ]),
        ({"attempt": 1}, {"attempt": 1, "phase": "Succeeded", "conditions": [said("Complete", "kept in the pod")]}, [
            "Warning Succeeded 1: kept in the pod",
        ]),
    ],
)  # fmt: skip
def test_an_event_says_what_happened_and_to_which_attempt(
    old: dict[str, Any], new: dict[str, Any], want: list[str]
) -> None:
    before, after = (a_run(status=status).status for status in (old, new))
    assert isinstance(after, LoRAFineTuneStatus)
    events = compute_events(before, after)
    assert [f"{event.type} {event.reason} {event.about}: {event.note}" for event in events] == want
