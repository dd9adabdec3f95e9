"""What an operator remembers of a run once its plan is done."""

from dataclasses import replace

import pytest

from lora_api import Failure, Phase
from lora_operator.controller.finetunes import settle
from lora_operator.state.plan import NOTHING, FailureRecord, LaunchAttempt, Plan
from lora_operator.state.reports import Refusal, Reports, forget_attempt
from lora_operator.state.workload import QueueReport
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, failure, running, seen

KNOWN = Reports(
    run_uid="run-uid",
    stage="training",
    refusal=Refusal("exceeded quota: few", ago(30)),
    queue=QueueReport(installed=True),
    queue_read_at=ago(30),
    queue_changed_at=ago(30),
    awaiting_since=ago(5),
)
FAILED = FailureRecord(Failure.model_validate({**failure(), "message": "it broke"}))
RUN = a_run(status={"attempt": 1})


@pytest.mark.parametrize(
    ("plan", "forgets"),
    [
        (Plan(phase=Phase.STARTING, attempt=1, actions=(LaunchAttempt(1),)), True),
        (Plan(phase=Phase.RESTARTING, attempt=1, failed=FAILED), True),
        (Plan(phase=Phase.STARTING, attempt=1), False),
        (NOTHING, False),
    ],
    ids=["a launch", "a verdict", "a look", "nothing"],
)
def test_a_new_attempt_begins_without_the_reports_of_the_one_before(plan: Plan, forgets: bool) -> None:
    after = settle(KNOWN, seen(RUN, a_job(), reports=KNOWN), plan, NOW)
    assert (after == forget_attempt(KNOWN)) is forgets
    assert (after.stage == "training") is not forgets


@pytest.mark.parametrize(
    ("parts", "refused", "queued"),
    [
        ((a_job(), a_pod(0)), True, False),
        ((a_job(), running(0), running(1)), False, False),
        ((a_job(suspended=True),), True, True),
    ],
    ids=["a pod is missing", "all pods are made", "it waits in its queue"],
)
def test_a_refusal_and_a_place_in_a_queue_are_forgotten_once_they_are_over(
    parts: tuple[JobView | PodView, ...], refused: bool, queued: bool
) -> None:
    observed = seen(RUN, *parts, reports=KNOWN)
    after = settle(KNOWN, observed, Plan(phase=Phase.STARTING, attempt=1), NOW)
    assert (after.refusal is not None, after.queue is not None) == (refused, queued)
    assert (after.queue_read_at is not None, after.queue_changed_at is not None) == (queued, queued)
    assert after.awaiting_since is None


def test_how_long_the_last_words_are_waited_for_counts_from_the_first_look() -> None:
    waits = replace(NOTHING, notes=replace(NOTHING.notes, words_of=(running(0),)))
    observed = seen(RUN, a_job(), running(0), reports=KNOWN)
    assert settle(KNOWN, observed, waits, NOW).awaiting_since == ago(5)
    assert settle(replace(KNOWN, awaiting_since=None), observed, waits, NOW).awaiting_since == NOW
