"""An operator that is started anew writes nothing where nothing has changed, and takes nothing back."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_api import LoRAFineTune
from lora_operator.diagnosis.firstseen import starting_seen, unmade_seen, unplaced_seen
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.diagnosis.silence import QUIET
from lora_operator.lifecycle.decide import decide
from lora_operator.lifecycle.told import CATCHING_UP, keep_words
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Refusal, Reports
from lora_operator.state.workload import QueueReport
from lora_operator.status.compute import compute_status
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_preflight, a_run, ago, running, seen, waiting
from tests.unit.operator.cases import QUEUE, QUEUED, SETTINGS

LONG = 900.0
ALL_RUN = (a_job(), running(0), running(1))
STUCK = a_pod(1, scheduled=True, node="gpu-7")
QUEUE_SAYS = QueueReport(installed=True, workload="w", queue="team-a", position=3, message="no quota")


def knows(**changes: Any) -> Reports:
    """What an operator knows that has looked at the run for long."""
    sightings = [unmade_seen(a_job()), unmade_seen(a_preflight()), starting_seen(STUCK)]
    times = dict.fromkeys([*sightings, *(unplaced_seen(a_pod(index)) for index in (0, 1))], ago(LONG))
    return replace(Reports(run_uid="run-uid", seen=times), **changes)


CASES: dict[str, tuple[LoRAFineTune, tuple[JobView | PodView, ...], Reports, str]] = {
    "pods that nobody makes": (a_run(status={"attempt": 1}), (a_job(),), knows(), "PodsNotMade"),
    "of a preflight": (a_run(), (a_preflight(),), knows(), "PodsNotMade"),
    "no scheduler": (a_run(status={"attempt": 1}), (a_job(), a_pod(0), a_pod(1)), knows(), "NoScheduler"),
    "a full quota": (
        a_run(status={"attempt": 1}), (a_job(),), knows(refusal=Refusal("exceeded quota: few", ago(LONG))),
        "QuotaExceeded",
    ),
    "a volume that is not mounted": (
        a_run(status={"attempt": 1}), (a_job(), running(0), STUCK),
        knows(pod_events={STUCK.uid: "FailedMount: no such volume"}), "FailedMount",
    ),
    "a second attempt": (a_run(status={"attempt": 2}), (a_job(2),), Reports(
        run_uid="run-uid", seen={unmade_seen(a_job(2)): ago(LONG)}), "PodsNotMade"),
    "a place in a queue": (a_run(status={"attempt": 1}, runPolicy=QUEUE), (QUEUED,), knows(queue=QUEUE_SAYS), "Queued"),
    "what a gang is at": (a_run(status={"attempt": 1}), ALL_RUN, knows(stage="training"), "Training"),
    "what the scheduler says": (
        a_run(status={"attempt": 1}),
        (a_job(), a_pod(0, unscheduled_reason="Unschedulable", unscheduled_message="0/3 nodes"), a_pod(1)), knows(),
        "Unschedulable",
    ),
    "an image that is not there": (
        a_run(status={"attempt": 1}), (a_job(), running(0), waiting(1, "ImagePullBackOff", "no such image")), knows(),
        "ImagePullFailed",
    ),
}  # fmt: skip


def tell(observed: Observed, seconds: float = 0.0) -> tuple[Plan, LoRAFineTune]:
    """What an operator does about ``observed`` so many seconds from now, and the run with the status that it writes."""
    now = NOW + timedelta(seconds=seconds)
    settings = replace(SETTINGS, preflight="on") if observed.preflights else SETTINGS
    observed = replace(observed, reports=note_sightings(observed, now))
    plan = keep_words(observed, decide(observed, now, settings), now)
    status = compute_status(observed.run, plan, observed.reports, now)
    return plan, observed.run.model_copy(update={"status": status})


@pytest.mark.parametrize("name", CASES)
def test_an_operator_that_starts_anew_changes_no_word(name: str) -> None:
    run, parts, known, reason = CASES[name]
    _, told = tell(seen(run, *parts, reports=known))
    assert told.status.reason == reason
    fresh = note_sightings(seen(told, *parts), NOW)
    for seconds in (0.0, 3.0, QUIET - 1):
        plan, again = tell(seen(told, *parts, reports=replace(Reports(run_uid="run-uid"), seen=fresh.seen)), seconds)
        assert again.status == told.status, seconds
        assert plan.phase is not None or plan.requeue_after is not None, "nobody would look again"
    late = replace(known, seen={**fresh.seen, **known.seen})
    assert tell(seen(told, *parts, reports=late), CATCHING_UP)[1].status == told.status


def restarted(**changes: Any) -> Observed:
    """A run of which was said that nobody makes its pods, and which this operator sees for the first time."""
    run, parts, known, _ = CASES["pods that nobody makes"]
    _, told = tell(seen(run, *parts, reports=known))
    return seen(told, *parts, reports=replace(Reports(run_uid="run-uid"), **changes))


def test_it_is_not_kept_for_longer_than_it_takes_to_know() -> None:
    first = note_sightings(restarted(), NOW)
    first = replace(first, seen={what: at for what, at in first.seen.items() if "unmade" not in what})
    assert tell(restarted(seen=first.seen), CATCHING_UP - 1)[0].requeue_after == 1.0
    _, run = tell(restarted(seen=first.seen), CATCHING_UP)
    assert run.status.reason == "Starting"


@pytest.mark.parametrize("change", ["this operator has told of it", "the run was edited", "its pods run", "another"])
def test_what_is_known_is_told_at_once(change: str) -> None:
    observed, want = restarted(), "Starting"
    match change:
        case "this operator has told of it":
            observed = restarted(status_written_at=ago(1))
        case "the run was edited":
            metadata = observed.run.metadata.model_copy(update={"generation": 9})
            observed = replace(observed, run=observed.run.model_copy(update={"metadata": metadata}))
        case "its pods run":
            observed, want = seen(observed.run, *ALL_RUN), "Running"
        case _:
            stuck = a_job(), running(0), waiting(1, "ImagePullBackOff", "no such image")
            observed, want = seen(observed.run, *stuck), "ImagePullFailed"
    assert tell(observed)[1].status.reason == want
