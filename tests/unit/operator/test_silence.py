"""Pods that are not there, or have no node, while nobody says why: that is told, and does not last for ever."""

from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.firstseen import unmade_seen, unplaced_seen
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.diagnosis.silence import QUIET
from lora_operator.lifecycle.decide import decide
from lora_operator.state.reports import Refusal, Reports
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_preflight, a_run, ago, running, seen, waiting
from tests.unit.operator.cases import SETTINGS, STARTED

DAY = 86_400.0
UNMADE = "2 of 2 pods of Job tickets-1 are not made, and no Event says why"
UNPLACED = "No scheduler has come to pods tickets-1-0, tickets-1-1"
MAKER, PLACER = "See whether the Job controller runs", "See whether the scheduler that spec.schedulerName"


@dataclass(frozen=True)
class Case:
    parts: tuple[JobView | PodView, ...]
    reason: str
    words: str
    remedy: str = ""


CASES = {
    "no Job controller comes": Case((a_job(started=None),), "PodsNotMade", UNMADE, MAKER),
    "one came, and made nothing": Case((a_job(),), "PodsNotMade", UNMADE, MAKER),
    "it made a part": Case((a_job(), running(0)), "PodsNotMade", "1 of 2 pods", MAKER),
    "no scheduler comes": Case((a_job(), a_pod(0), a_pod(1)), "NoScheduler", UNPLACED, PLACER),
    "one comes to a part": Case((a_job(), running(0), a_pod(1)), "NoScheduler", "to pod tickets-1-1", PLACER),
    "what is said comes first": Case(
        (a_job(), a_pod(0), a_pod(1, unscheduled_reason="Unschedulable", unscheduled_message="0/3 nodes")),
        "Unschedulable", "0/3 nodes",
    ),
    "and what a kubelet says": Case(
        (a_job(), a_pod(0), waiting(1, "ImagePullBackOff", "no such image")), "ImagePullFailed", "no such image"
    ),
    "a pod that somebody deletes waits for nobody": Case(
        (a_job(), running(0), a_pod(1, deleting_at=ago(9))), "Starting", "Waiting for the pods to start"
    ),
}  # fmt: skip


def silent(job: JobView, seconds: float) -> Reports:
    pods = {unplaced_seen(a_pod(index)): ago(seconds) for index in (0, 1)}
    return Reports(run_uid="run-uid", seen={unmade_seen(job): ago(seconds), **pods})


@pytest.mark.parametrize("name", CASES)
def test_what_nobody_speaks_of(name: str) -> None:
    case = CASES[name]
    observed = seen(a_run(status=STARTED), *case.parts, reports=silent(a_job(), QUIET))
    plan = decide(observed, NOW, SETTINGS)
    assert (plan.phase, plan.reason, plan.ended) == (Phase.STARTING, case.reason, False)
    assert case.words in plan.message
    assert f"Remedy: {case.remedy}" in plan.message or not case.remedy
    if case.remedy:
        assert plan.conditions[ConditionType.SCHEDULED].message == plan.message
        assert "The run starts by itself" in plan.message
        early = replace(observed, reports=silent(a_job(), QUIET - 1))
        assert decide(early, NOW, SETTINGS).reason == "Starting"


def test_a_preflight_that_nobody_makes_checks_nothing() -> None:
    job = a_preflight(started=None)
    settings = replace(SETTINGS, preflight="on")
    plan = decide(seen(a_run(), job, reports=silent(job, QUIET)), NOW, settings)
    assert (plan.phase, plan.reason) == (Phase.PREFLIGHT, "PodsNotMade")
    assert "1 of 1 pods of Job tickets-pre1 are not made" in plan.conditions[ConditionType.PREFLIGHT_PASSED].message


def test_pods_that_nobody_makes_for_a_day_end_the_run() -> None:
    for lasted, ended in ((DAY - 1, False), (DAY, True)):
        plan = decide(seen(a_run(status=STARTED), a_job(), reports=silent(a_job(), lasted)), NOW, SETTINGS)
        assert plan.ended is ended
        assert (plan.failure and plan.failure.failure_class) == (FailureClass.POD_NOT_STARTED if ended else None)
        assert ("starts by itself" in plan.message, "raise runPolicy.retry" in plan.message) == (not ended, ended)


def test_a_part_of_a_gang_gives_back_what_it_holds_while_the_rest_is_not_made() -> None:
    run = a_run(status=STARTED, runPolicy={"placementTimeoutSeconds": 60})
    parts = (a_job(), running(0))
    early = decide(seen(run, *parts, reports=silent(a_job(), QUIET - 1)), NOW, SETTINGS)
    assert not early.notes.short_of_room
    late = decide(seen(run, *parts, reports=silent(a_job(), QUIET)), NOW, SETTINGS)
    assert late.notes.short_of_room
    over = replace(silent(a_job(), QUIET + 60), short_of_room_since=ago(60))
    plan = decide(seen(run, *parts, reports=over), NOW, SETTINGS)
    assert plan.failure is not None
    assert plan.failure.failure_class is FailureClass.NOT_PLACED
    assert (
        plan.failure.message == "1 of 2 pods had a node. 1 of 2 pods of Job tickets-1 are not made, and no Event "
        "says why"
    )
    assert plan.failure.remedy.startswith(MAKER)


def test_what_is_refused_is_told_in_the_words_of_the_refusal() -> None:
    reports = replace(silent(a_job(), 600), refusal=Refusal("exceeded quota: few", ago(30)))
    assert decide(seen(a_run(status=STARTED), a_job(), reports=reports), NOW, SETTINGS).reason == "QuotaExceeded"


def test_a_part_of_a_gang_whose_rest_a_policy_denies_ends_by_that_and_not_for_want_of_room() -> None:
    denied = Refusal('admission webhook "rules.example.com" denied the request: no team label', ago(30))
    reports = replace(silent(a_job(), QUIET), refusal=denied)
    plan = decide(seen(a_run(status=STARTED), a_job(), running(0), reports=reports), NOW, SETTINGS)
    assert not plan.notes.short_of_room
    assert "no Event says why" not in plan.message


def test_the_time_counts_from_when_it_was_seen_and_ends_with_it() -> None:
    """A Job that its queue has let go begins anew, however long it has waited there."""
    run, first = a_run(status=STARTED), note_sightings(seen(a_run(status=STARTED), a_job(suspended=True)), ago(900))
    assert unmade_seen(a_job()) not in first.seen
    unmade = note_sightings(seen(run, a_job(), reports=first), ago(30))
    assert unmade.seen[unmade_seen(a_job())] == ago(30)
    unplaced = note_sightings(seen(run, a_job(), a_pod(0), a_pod(1), reports=unmade), NOW)
    assert unmade_seen(a_job()) not in unplaced.seen
    assert unplaced.seen[unplaced_seen(a_pod(1))] == NOW
    later = NOW + timedelta(seconds=5)
    placed = note_sightings(seen(run, a_job(), running(0), a_pod(1), reports=unplaced), later)
    assert unplaced_seen(a_pod(0)) not in placed.seen
    assert placed.seen[unplaced_seen(a_pod(1))] == NOW
