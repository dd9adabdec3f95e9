"""What the end of a log tells, and what is known where something could not be read."""

import json
from dataclasses import replace
from typing import Any

import pytest

from lora_api.messages import PROGRESS_KEY
from lora_operator.evidence.reader import Reader, build_progress_change
from lora_operator.evidence.wants import EventsOfPods, LastWordsOf, ProgressOf, QueueOf, RefusalOf, Want
from lora_operator.state.reports import Reports
from lora_operator.state.workload import QueueReport
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, ended, stamp

ASKED = ago(3)
FULL = Reports(
    last_word="step 1 of 9", heard_at=ago(50), queue=QueueReport(queue="team", position=2), last_words={"other": "word"}
)


def told(**line: Any) -> str:
    """A line of progress, as it is in a log."""
    fields = {"event": "step", "at": stamp(NOW), "totalSteps": 9, **line}
    return json.dumps({PROGRESS_KEY: fields}, separators=(",", ":")) + "\n"


def read(log: str, **pod: Any) -> Reports:
    change = build_progress_change(a_run(status={"attempt": 1}), replace(a_pod(), **pod), log, ASKED, NOW)
    return change(Reports())


def test_a_log_without_progress_tells_of_life_alone() -> None:
    found = read("loading\n")
    assert (found.progress, found.first_step, found.last_word) == (None, None, "")
    assert (found.last_output, found.heard_at, found.log_read_at) == ("loading", NOW, ASKED)


def test_steps_become_progress() -> None:
    found = read(told(step=1, loss=2.0) + told(step=2, loss=1.5))
    assert found.progress is not None
    assert (found.progress.step, found.progress.total_steps) == (2, 9)
    assert found.first_step is not None
    assert (found.first_step.step, found.heard_at) == (1, NOW)


def test_steps_that_cannot_be_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = read(told(step=1) + told(step=12))
    assert found.progress is not None
    assert found.progress.step == 1
    assert "tells of 1 steps that cannot be" in caplog.text
    caplog.clear()
    read(told(step=1) + told(step=2))
    assert caplog.text == ""


@pytest.mark.parametrize("over", [False, True])
def test_the_log_of_a_pod_that_has_ended_is_read_once_more(over: bool) -> None:
    assert read(told(step=1), ended=ended(0).ended if over else None).log_read_to_end is over


POD = a_pod()
UNREAD: dict[str, tuple[Want, dict[str, Any]]] = {
    "the log of a pod that runs": (ProgressOf(POD), {"heard_at": NOW, "log_read_at": NOW}),
    "the log of a pod that has ended": (
        ProgressOf(ended(0)), {"heard_at": NOW, "log_read_at": NOW, "log_read_to_end": True}
    ),
    "last words": (LastWordsOf(POD), {"last_words": {"other": "word", POD.uid: None}}),
    "a refusal": (RefusalOf(a_job()), {"refusal_read_at": NOW}),
    "a queue": (QueueOf(a_job()), {"queue_read_at": NOW}),
    "Events of pods": (EventsOfPods(a_job(), (POD,)), {"pod_events_read_at": NOW}),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_could_not_be_read_is_not_asked_for_again_at_once_and_nothing_is_made_of_it(case: str) -> None:
    want, changes = UNREAD[case]
    found = Reader(None, None, lambda: NOW).build_unread(want, NOW)(FULL)  # type: ignore[arg-type]  (reads nothing)
    assert replace(found, queue_changed_at=None) == replace(FULL, **changes)


def test_a_log_that_was_read_to_its_end_stays_so() -> None:
    reader = Reader(None, None, lambda: NOW)  # type: ignore[arg-type]
    assert reader.build_unread(ProgressOf(POD), NOW)(replace(FULL, log_read_to_end=True)).log_read_to_end


@pytest.mark.parametrize(
    ("want", "permission", "what"),
    [
        (ProgressOf(POD), "get pods/log", f"team/{POD.name}: log"),
        (LastWordsOf(POD), "get pods/log", f"team/{POD.name}: log"),
        (RefusalOf(a_job()), "list events", "team/tickets-1: Events"),
        (EventsOfPods(a_job(), (POD,)), "list events", "team/tickets-1: Events"),
        (QueueOf(a_job()), "list workloads.kueue.x-k8s.io", "team/tickets-1: Workload"),
    ],
)
def test_what_the_role_has_to_allow(want: Want, permission: str, what: str) -> None:
    assert (Reader.permission(want), Reader.describe(want)) == (permission, what)
