"""What Kueue says, in its own words, and when it is asked."""

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.diagnosis.firstseen import job_seen
from lora_operator.evidence.wants import QUEUE_INTERVAL, REFUSAL_DELAY, compute_next_look, wants_queue, wants_refusal
from lora_operator.lifecycle.queued import describe_queue
from lora_operator.settings import Settings
from lora_operator.state.plan import Plan
from lora_operator.state.reports import Reports, hear_queue
from lora_operator.state.workload import QueueReport, find_position, parse_workload
from tests.unit.operator.builders import NOW, a_job, a_run, ago, running, seen, sighted

SETTINGS = Settings(log_interval=10.0)
STARTED = {"attempt": 1}
WAITS = QueueReport(workload="job-tickets-1-x", queue="team-a", message="no quota")


def a_workload(*conditions: tuple[str, str, str, str], queue: str = "team-a") -> dict[str, Any]:
    """A Workload with conditions of type, status, reason and message."""
    keys = ("type", "status", "reason", "message")
    listed = [dict(zip(keys, condition, strict=True)) for condition in conditions]
    return {
        "metadata": {"name": "job-tickets-1-x"},
        "spec": {"queueName": queue},
        "status": {"conditions": listed} if listed else {},
    }


NO_QUOTA = ("QuotaReserved", "False", "Pending", "insufficient unused quota")
HAS_QUOTA = ("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue gpus")
NO_QUEUE = ("QuotaReserved", "False", "Inadmissible", "LocalQueue team-a doesn't exist")
CHECKED = ("Admitted", "False", "NoChecks", "The workload has not passed all admission checks")
EVICTED = ("Evicted", "True", "Preempted", "Preempted to accommodate a workload")
ONCE_EVICTED = ("Evicted", "False", "QuotaReserved", "Previously: Preempted")


@pytest.mark.parametrize(
    ("workload", "pending", "text"),
    [
        (a_workload(), True, "Waiting in queue team-a: Kueue has not looked at it yet"),
        (a_workload(NO_QUOTA), True, "Waiting in queue team-a: insufficient unused quota"),
        (a_workload(NO_QUOTA, ONCE_EVICTED), True, "Waiting in queue team-a: insufficient unused quota"),
        (
            a_workload(HAS_QUOTA, CHECKED),
            False,
            "Waiting in queue team-a: The workload has not passed all admission checks",
        ),
        (
            a_workload(("QuotaReserved", "False", "Inadmissible", "LocalQueue  doesn't exist"), queue=""),
            False,
            "Kueue holds Job tickets-1 back, which names no queue (its manageJobsWithoutQueueName is on). Remedy: Set "
            "queueName in the ClusterLoRARuntime, or create the run again with runPolicy.queueName. kubectl label job "
            "tickets-1 kueue.x-k8s.io/queue-name=NAME puts this one into the LocalQueue NAME.",
        ),
        (
            a_workload(NO_QUEUE),
            True,
            "Waiting in queue team-a: LocalQueue team-a doesn't exist. Remedy: See kubectl describe localqueue: it has "
            "to exist in this namespace under the name in runPolicy.queueName, and its ClusterQueue has to be active.",
        ),
    ],
)
def test_kueue_says_why_a_run_waits(workload: dict[str, Any], pending: bool, text: str) -> None:
    report = parse_workload(workload)
    assert (report.pending, report.evicted, describe_queue("tickets-1", report)) == (pending, "", text)


def test_kueue_says_why_it_took_the_quota_back() -> None:
    report = parse_workload(a_workload(HAS_QUOTA, EVICTED))
    assert (report.evicted, report.evicted_message) == ("Preempted", "Preempted to accommodate a workload")
    assert not report.deactivated
    assert parse_workload(a_workload(("Evicted", "True", "DeactivatedDueToRequeuingLimitExceeded", "off"))).deactivated


def test_the_number_is_that_in_the_cluster_queue() -> None:
    pending = [
        {"metadata": {"name": "job-other"}, "positionInClusterQueue": 0},
        {"metadata": {"name": "job-tickets-1-x"}, "positionInClusterQueue": 3, "positionInLocalQueue": 1},
        {"metadata": {"name": "job-first"}},
    ]
    assert [find_position(pending, name) for name in ("job-tickets-1-x", "job-first", "gone")] == [4, 1, None]
    assert describe_queue("tickets-1", replace(WAITS, position=4)) == "Number 4 in queue team-a: no quota"


def test_without_kueue_the_remedy_is_to_install_it() -> None:
    text = describe_queue("tickets-1", QueueReport(installed=False))
    assert text.startswith("Nobody has taken up Job tickets-1: this cluster has no Kueue. Remedy: Install Kueue")
    text = describe_queue("tickets-1", QueueReport())
    assert text.startswith("Kueue has made no Workload for Job tickets-1. Remedy: See kubectl describe job")


QUEUED = a_job(suspended=True, was_suspended=True)


def read(seconds_ago: float, same_for: float) -> Reports:
    """Reports of an answer that came ``seconds_ago``, and had then been the same for so long."""
    times = {job_seen(QUEUED): ago(seconds_ago + same_for + 4)}
    return Reports(
        queue=WAITS, queue_read_at=ago(seconds_ago), queue_changed_at=ago(seconds_ago + same_for), seen=times
    )


@pytest.mark.parametrize(
    ("observed", "asks", "next_look"),
    [
        (seen(a_run(status=STARTED), QUEUED, reports=sighted(job_seen(QUEUED), 1)), False, REFUSAL_DELAY),
        (seen(a_run(status=STARTED), QUEUED, reports=sighted(job_seen(QUEUED), 4)), True, REFUSAL_DELAY),
        (seen(a_run(status=STARTED), a_job(suspended=True, created=ago(1)), running()), True, REFUSAL_DELAY),
        (seen(a_run(status=STARTED), QUEUED, reports=read(29, same_for=0)), False, 30.0),
        (seen(a_run(status=STARTED), QUEUED, reports=read(31, same_for=0)), True, 30.0),
        (seen(a_run(status=STARTED), QUEUED, reports=read(31, same_for=240)), False, 240.0),
        (seen(a_run(status=STARTED), QUEUED, reports=read(241, same_for=240)), True, 240.0),
        (seen(a_run(status=STARTED), QUEUED, reports=read(599, same_for=9000)), False, QUEUE_INTERVAL),
        (seen(a_run(status=STARTED), a_job(), running(), reports=Reports(log_read_at=NOW)), False, 10.0),
    ],
    ids=[
        "Kueue gets a moment", "then it is asked", "at once about pods", "not too soon", "again",
        "seldom while all is the same", "but again", "and at least so often", "not about a gang that runs",
    ],
)  # fmt: skip
def test_kueue_is_asked_seldom(observed: Any, asks: bool, next_look: float) -> None:
    assert (wants_queue(observed, NOW, SETTINGS) is not None) is asks
    assert compute_next_look(observed, Plan(), SETTINGS) == next_look
    assert observed.live_job() != QUEUED or wants_refusal(observed, NOW, SETTINGS) is None


def test_the_time_of_the_last_news_is_kept() -> None:
    first = hear_queue(Reports(), WAITS, ago(60))
    same = hear_queue(first, replace(WAITS), ago(30))
    news = hear_queue(same, replace(WAITS, position=1), NOW)
    changed = [reports.queue_changed_at for reports in (first, same, news)]
    assert changed == [ago(60), ago(60), NOW]
    assert [reports.queue_read_at for reports in (first, same, news)] == [ago(60), ago(30), NOW]
    assert hear_queue(news, None, None) == Reports()
