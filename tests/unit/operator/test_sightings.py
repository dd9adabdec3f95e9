"""What is seen first, and when: by our own clock, whatever the clock of a node says."""

from dataclasses import replace

import pytest

from lora_api import Phase
from lora_operator.controller.finetunes import settle
from lora_operator.diagnosis.diagnose import diagnose_pod, seconds_to_lost
from lora_operator.diagnosis.firstseen import (
    LEFTOVERS,
    ORPHANS,
    end_seen,
    held_up_seen,
    job_seen,
    retry_seen,
    run_seen,
    started_seen,
    starting_seen,
)
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.policies.pause import seconds_to_retry
from lora_operator.state.observed import Observed, seconds_to_leaving, stop_seen
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Reports, forget_attempt, forget_pods
from tests.unit.operator.builders import NOW, a_job, a_preflight, a_run, ago, ended, running, seen, stamp, waiting
from tests.unit.operator.cases import FAILED_ONCE, STARTED

JOB = a_job()
PREFLIGHT = a_preflight(started=ago(80))
IMAGE = held_up_seen(waiting(0, ""), "ImagePullFailed")
OTHER_IMAGE = held_up_seen(waiting(1, ""), "ImagePullFailed")
CONFIG = held_up_seen(waiting(0, ""), "PodNotStarted")


def note(observed: Observed, before: Reports | None = None) -> Reports:
    return note_sightings(observed if before is None else replace(observed, reports=before), NOW)


def test_what_stays_keeps_its_time_and_what_passes_is_forgotten() -> None:
    held = seen(a_run(status=STARTED), JOB, waiting(0, "ErrImagePull"), waiting(1, "ContainerCreating"))
    before = Reports(seen={job_seen(JOB): ago(60), IMAGE: ago(30), CONFIG: ago(20)})
    old = {job_seen(JOB): ago(60), started_seen(JOB): ago(50)}
    before = replace(before, seen={**before.seen, **old})
    starts = {starting_seen(waiting(0, "")): NOW, starting_seen(waiting(1, "")): NOW}
    assert note(held, before).seen == {**old, IMAGE: ago(30), **starts}
    pulled = seen(a_run(status=STARTED), JOB, running(0), waiting(1, "ContainerCreating"))
    assert note(pulled, before).seen == {**old, starting_seen(waiting(1, "")): NOW}
    again = seen(a_run(status=STARTED), JOB, waiting(0, "ImagePullBackOff"))
    assert note(again, note(pulled, before)).seen[IMAGE] == NOW, "a pull that succeeded begins it anew"
    other = note(seen(a_run(status=STARTED), JOB, running(0), waiting(1, "ImagePullBackOff")), before).seen
    assert other[OTHER_IMAGE] == NOW, "the time of one pod is not that of another"
    assert IMAGE not in other


def test_nothing_new_is_no_new_report() -> None:
    observed = seen(a_run(status=STARTED), JOB, ended(0), running(1))
    reports = note(observed)
    assert reports.seen == {job_seen(JOB): NOW, started_seen(JOB): ago(100), end_seen(ended(0)): NOW}
    assert note(observed, reports) is reports


def test_a_preflight_that_begins_to_run_does_so_now() -> None:
    pod = running(0, job_uid="pre-1", attempt=0, scheduled_at=ago(70))
    before = Reports(seen={job_seen(PREFLIGHT): ago(75)})
    assert note(seen(a_run(), PREFLIGHT, pod), before).seen[run_seen(PREFLIGHT)] == NOW


def test_one_that_runs_when_the_operator_begins_may_have_begun_when_it_got_its_node() -> None:
    """What the control plane tells: the kubelet has no part in either time."""
    for scheduled_at, want in ((ago(70), ago(70)), (ago(7200), ago(80)), (None, ago(80)), (ago(-7200), ago(80))):
        pod = running(0, job_uid="pre-1", attempt=0, scheduled_at=scheduled_at)
        assert note(seen(a_run(), PREFLIGHT, pod)).seen[run_seen(PREFLIGHT)] == want


def test_orphans_are_seen_once_no_job_is_left() -> None:
    orphan = running(0, orphaned=True)
    assert note(seen(a_run(status=FAILED_ONCE), orphan)).seen == {ORPHANS: NOW}
    stopping = replace(orphan, deleting_at=NOW)
    assert note(seen(a_run(status=FAILED_ONCE), stopping)).seen == {LEFTOVERS: NOW, stop_seen(stopping): NOW}


@pytest.mark.parametrize("skew", [-86400, -600, 0, 300, 86400])
@pytest.mark.parametrize(("asked", "lost"), [(0, False), (139, False), (141, True)])
def test_a_pod_that_was_asked_to_stop_has_its_time_whatever_the_clock_of_the_api_server(
    skew: float, asked: float, lost: bool
) -> None:
    pod = running(0, deleting_at=ago(skew), stop_seconds=120.0)
    times = {stop_seen(pod): ago(asked)}
    assert bool(diagnose_pod(pod, NOW, grace=20, seen=times)) is lost
    left = seconds_to_leaving([pod], NOW, 20, times)
    assert left == (None if lost else 140 - asked)
    assert seconds_to_lost([pod], NOW, 20, times) == max(1.0, 141 - asked)
    assert diagnose_pod(pod, NOW, grace=20) is None, "one that is seen first has all of its time"


def test_that_a_pod_was_asked_to_stop_is_remembered_beyond_its_attempt() -> None:
    pod = running(0, deleting_at=NOW)
    reports = Reports(seen={stop_seen(pod): ago(50), job_seen(JOB): ago(60)})
    assert forget_attempt(reports).seen == {stop_seen(pod): ago(50)}
    assert forget_pods(reports).seen == reports.seen, "nor does a Job that waits in its queue begin anew"


def test_a_job_that_waits_in_its_queue_is_seen_once() -> None:
    observed = seen(a_run(status=STARTED), a_job(suspended=True))
    plan = Plan(phase=Phase.QUEUED)
    first = settle(Reports(), observed, plan, ago(30))
    assert first.seen == {job_seen(JOB): ago(30)}
    assert settle(first, observed, plan, NOW) is first


@pytest.mark.parametrize(
    ("at", "waited", "left"), [(-20, 0, 20), (0, 0, None), (5, 0, None), (-31536000, 0, 600), (-31536000, 600, None)]
)
def test_a_retry_time_is_waited_for_no_longer_than_the_longest_pause(
    at: float, waited: float, left: float | None
) -> None:
    run = a_run(status={**FAILED_ONCE, "retryTime": stamp(ago(at))})
    reports = Reports(seen={retry_seen(ago(at)): ago(waited)})
    assert seconds_to_retry(seen(run, reports=reports), NOW) == left
    assert retry_seen(ago(at)) in note(seen(run)).seen
