"""What has to be looked up before a run is decided on."""

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.controller.questions import JobAsItIs, lacks_preflight, questions
from tests.unit.operator.builders import NOW, a_preflight, a_run, condition, ended, running, said, seen
from tests.unit.operator.cases import JOB, SETTINGS, STARTED

CHECKED = replace(SETTINGS, preflight="on")
PREFLIGHT = a_preflight()


def pod_of(**changes: Any) -> Any:
    return replace(running(0), attempt=0, job_uid=PREFLIGHT.uid, **changes)


@pytest.mark.parametrize(
    ("parts", "asked"),
    [
        ((PREFLIGHT, pod_of(gone=True)), [JobAsItIs(PREFLIGHT)]),
        ((PREFLIGHT, pod_of()), []),
        ((replace(PREFLIGHT, suspended=True), pod_of(gone=True)), []),
        ((replace(PREFLIGHT, deleting=True), pod_of(gone=True)), []),
    ],
    ids=["its pod was deleted", "its pod runs", "it is known to be suspended", "it is deleted itself"],
)
def test_whether_the_job_of_a_preflight_is_suspended(parts: tuple[Any, ...], asked: list[JobAsItIs]) -> None:
    """Kueue may have suspended it, so that its pod was deleted: the watch of Jobs may be later than that of pods."""
    found = questions(seen(a_run(), *parts), NOW, CHECKED)
    assert [question for question in found if isinstance(question, JobAsItIs)] == asked


def test_a_gang_is_not_asked_about() -> None:
    pods = (replace(running(0), gone=True), ended(1, 73, said("PeerLost")))
    found = questions(seen(a_run(status=STARTED), JOB, *pods), NOW, SETTINGS)
    assert not [question for question in found if isinstance(question, JobAsItIs)]


LOOKED_AT = {"failedPreflights": 1, "conditions": [condition("PreflightPassed", "Unknown")]}


@pytest.mark.parametrize(
    ("status", "numbers", "lacks"),
    [
        (LOOKED_AT, [], True),
        (LOOKED_AT, [1], False),
        (LOOKED_AT, [2], False),
        (LOOKED_AT, [3], True),
        ({}, [], False),
        ({**LOOKED_AT, "conditions": [condition("Failed")]}, [], False),
    ],
    ids=["none", "the one before", "the one that counts", "a later one", "nobody has looked", "it has ended"],
)
def test_whether_the_preflight_that_counts_is_missing(status: dict[str, Any], numbers: list[int], lacks: bool) -> None:
    observed = seen(a_run(status=status), *(a_preflight(number) for number in numbers))
    assert lacks_preflight(observed, CHECKED) is lacks
