"""What is seen first, and when: by our own clock, whatever the clock of a node says."""

from dataclasses import replace

from lora_operator.diagnosis.firstseen import (
    LEFTOVERS,
    ORPHANS,
    end_seen,
    held_up_seen,
    job_seen,
    run_seen,
    starting_seen,
)
from lora_operator.diagnosis.sightings import note_sightings
from lora_operator.state.observed import Observed
from lora_operator.state.reports import Reports
from tests.unit.operator.builders import NOW, a_job, a_preflight, a_run, ago, ended, running, seen, waiting
from tests.unit.operator.cases import FAILED_ONCE, STARTED

JOB = a_job()
PREFLIGHT = a_preflight(started=ago(80))
IMAGE = held_up_seen(JOB, "ImagePullFailed")
CONFIG = held_up_seen(JOB, "PodNotStarted")


def note(observed: Observed, before: Reports | None = None) -> Reports:
    return note_sightings(observed if before is None else replace(observed, reports=before), NOW)


def test_what_stays_keeps_its_time_and_what_passes_is_forgotten() -> None:
    held = seen(a_run(status=STARTED), JOB, waiting(0, "ErrImagePull"), waiting(1, "ContainerCreating"))
    before = Reports(seen={job_seen(JOB): ago(60), IMAGE: ago(30), CONFIG: ago(20)})
    starts = {starting_seen(waiting(0, "")): NOW, starting_seen(waiting(1, "")): NOW}
    assert note(held, before).seen == {job_seen(JOB): ago(60), IMAGE: ago(30), **starts}
    pulled = seen(a_run(status=STARTED), JOB, running(0), waiting(1, "ContainerCreating"))
    assert note(pulled, before).seen == {job_seen(JOB): ago(60), starting_seen(waiting(1, "")): NOW}
    again = seen(a_run(status=STARTED), JOB, running(0), waiting(1, "ImagePullBackOff"))
    assert note(again, note(pulled, before)).seen[IMAGE] == NOW, "a pull that succeeded begins it anew"


def test_nothing_new_is_no_new_report() -> None:
    observed = seen(a_run(status=STARTED), JOB, ended(0), running(1))
    reports = note(observed)
    assert reports.seen == {job_seen(JOB): NOW, end_seen(ended(0)): NOW}
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
    assert note(seen(a_run(status=FAILED_ONCE), replace(orphan, deleting_at=NOW))).seen == {LEFTOVERS: NOW}
