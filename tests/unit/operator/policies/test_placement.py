"""Gangs for which there is room in part."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.controller.finetunes import settle
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from lora_operator.state.reports import Refusal, Reports
from lora_operator.status.compute import compute_status
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_pod,
    a_run,
    ago,
    condition,
    ended,
    failure,
    running,
    said,
    seen,
    stamp,
    waiting,
)
from tests.unit.operator.cases import SETTINGS

FULL = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
OTHER = "0/4 nodes are available: 4 node(s) had untolerated taint(s)."
LEFT_OUT = (
    "0/4 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 3 Insufficient nvidia.com/gpu."
)
CLAIM = '0/4 nodes are available: persistentvolumeclaim "data" not found.'
IN_USE = (
    "0/4 nodes are available: 4 node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod "
    "access mode."
)
AVOIDED = [{"name": "n7", "reason": "NodeLost", "since": stamp(ago(60))}]
JOB = a_job(size=4)


def unplaced(index: int, words: str = FULL, **changes: Any) -> PodView:
    return a_pod(index, **{"unscheduled_reason": "Unschedulable", "unscheduled_message": words, **changes})


def gang(*pods: PodView, since: float | None = None, refusal: str = "", **status: Any) -> Observed:
    """``since``: seconds for which this operator has seen that room is short."""
    run = a_run(
        status={"attempt": 1, **status}, parallelism={"nodes": 4, "gpusPerNode": 0},
        runPolicy={"placementTimeoutSeconds": 60},
    )  # fmt: skip
    reports = Reports(
        short_of_room_since=None if since is None else ago(since),
        refusal=Refusal(refusal, ago(30)) if refusal else None,
    )
    return seen(run, JOB, *pods, reports=reports)


@dataclass(frozen=True)
class Case:
    """``left``: seconds until the gang gives back what it has; ``None`` where it does not, 0 where it does now."""

    observed: Observed
    left: float | None


QUOTA = "exceeded quota: gpus, requested: 1, used: 2, limited: 2"
AWAY = 'Internal error occurred: failed calling webhook "mesh.example.org": connection refused'
CASES = {
    "a part that has nodes has a while": Case(gang(running(0), running(1), unplaced(2), unplaced(3)), 60.0),
    "the while counts from when it was seen": Case(
        gang(running(0), running(1), running(2), unplaced(3), since=45), 15.0
    ),
    "then it gives back what it has": Case(gang(running(0), running(1), unplaced(2), unplaced(3), since=60), 0.0),
    "whether its pods run or not": Case(
        gang(a_pod(0, scheduled=True), *(unplaced(index) for index in (1, 2, 3)), since=60), 0.0
    ),
    "a gang that has no node waits where it is": Case(gang(*(unplaced(index) for index in range(4)), since=9e6), None),
    "a pod that waits for its image has room": Case(
        gang(running(0), running(1), running(2), waiting(3, "ContainerCreating"), since=9e6), None
    ),
    "a part that waits for the claim of another pod holds its nodes as well": Case(
        gang(running(0), running(1), running(2), unplaced(3, CLAIM), since=50), 10.0
    ),
    "and one that waits for a pod which somebody holds back": Case(
        gang(running(0), running(1), running(2), unplaced(3, unscheduled_reason="SchedulingGated"), since=60), 0.0
    ),
    "and one to whose pods no scheduler comes": Case(gang(running(0), a_pod(1), a_pod(2), a_pod(3), since=60), 0.0),
    "a gang that waits for a claim as a whole holds none": Case(
        gang(*(unplaced(index, CLAIM) for index in range(4)), since=9e6), None
    ),
    "a quota that has room for a part is no better": Case(gang(running(0), running(1), refusal=QUOTA, since=60), 0.0),
    "a quota that has room for none holds nothing": Case(gang(refusal=QUOTA, since=9e6), None),
    "a webhook that is away is no better either": Case(gang(running(0), running(1), refusal=AWAY, since=60), 0.0),
    "a webhook that lets none through is waited for": Case(gang(refusal=AWAY, since=9e6), None),
    "pods that a policy denies are none of this": Case(
        gang(running(0), running(1), refusal="violates PodSecurity", since=60), None
    ),
    "nodes that the run avoids may be all that there is": Case(
        gang(*(unplaced(index, LEFT_OUT) for index in range(4)), since=50, avoidedNodes=AVOIDED), 10.0
    ),
    "but not where all others are full": Case(
        gang(*(unplaced(index) for index in range(4)), since=9e6, avoidedNodes=AVOIDED), None
    ),
    "nor where a quota is": Case(gang(refusal=QUOTA, since=9e6, avoidedNodes=AVOIDED), None),
    "then they are used again": Case(
        gang(*(unplaced(index, LEFT_OUT) for index in range(4)), since=60, avoidedNodes=AVOIDED), 0.0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gang_that_is_short_of_room(name: str) -> None:
    case = CASES[name]
    plan = decide(case.observed, NOW, SETTINGS)
    found = plan.failure.failure_class if plan.failure else None
    assert plan.notes.short_of_room == (case.left not in (None, 0.0))
    if case.left == 0.0:
        assert plan.failed is not None
        assert (found, plan.failed.charged, plan.phase) == (FailureClass.NOT_PLACED, False, Phase.RESTARTING)
        assert plan.failed.avoided == ()
        assert SETTINGS.restart_backoff / 2 <= plan.failed.backoff <= SETTINGS.restart_backoff
    else:
        assert found is None
        assert case.left is None or plan.requeue_after == case.left


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (FULL, ["n7"]),
        (OTHER, ["n7"]),
        (LEFT_OUT, []),
        ("all 4 nodes are unavailable: queue is full", []),  # of another scheduler, which may not tell
    ],
)
def test_nodes_are_avoided_on_where_they_are_not_why_there_is_no_room(words: str, kept: list[str]) -> None:
    pods = [running(0), *(unplaced(index, words) for index in (1, 2, 3))]
    plan = decide(gang(*pods, since=60, avoidedNodes=AVOIDED), NOW, SETTINGS)
    assert plan.failed is not None
    assert [node.name for node in plan.failed.avoided or ()] == kept
    assert ("may be used again: n7" in plan.failed.failure.message) == (not kept)


def test_a_quota_that_is_full_forgets_no_node() -> None:
    plan = decide(gang(running(0), running(1), refusal=QUOTA, since=60, avoidedNodes=AVOIDED), NOW, SETTINGS)
    assert plan.failed is not None
    assert [node.name for node in plan.failed.avoided or ()] == ["n7"]


@pytest.mark.parametrize(
    ("pods", "refusal", "word"),
    [
        ([running(0), running(1)], QUOTA, "Wait until the quota has room"),
        ([running(0), running(1)], AWAY, "webhook"),
        ([running(0), running(1), unplaced(2)], AWAY, "Free or add nodes"),
        ([running(0), running(1), running(2), unplaced(3, CLAIM)], "", "Create the claim"),
        ([running(0), running(1), running(2), unplaced(3, IN_USE)], "", "ReadWriteMany"),
        ([running(0), a_pod(1), a_pod(2), a_pod(3)], "", "schedulerName"),
    ],
    ids=["a quota", "a webhook", "a webhook, and no room", "a claim", "a claim for one pod", "no scheduler"],
)
def test_the_remedy_is_that_of_what_is_lacking(pods: list[PodView], refusal: str, word: str) -> None:
    plan = decide(gang(*pods, refusal=refusal, since=60), NOW, SETTINGS)
    assert plan.failure is not None
    assert plan.failure.failure_class is FailureClass.NOT_PLACED
    assert word in (plan.failure.remedy or "")
    assert refusal in plan.failure.message


def test_the_default_is_ten_minutes() -> None:
    observed = gang(running(0), running(1), running(2), unplaced(3))
    spec = a_run(parallelism={"nodes": 4, "gpusPerNode": 0}).spec
    assert spec.run_policy.placement_timeout_seconds is None
    observed = replace(observed, run=observed.run.model_copy(update={"spec": spec}))
    assert decide(observed, NOW, SETTINGS).requeue_after == 600.0


def test_the_status_says_which_pods_wait_for_what_each_reason_once() -> None:
    plan = decide(gang(running(0), unplaced(1), unplaced(2, OTHER), unplaced(3)), NOW, SETTINGS)
    mark = plan.conditions[ConditionType.SCHEDULED]
    assert mark.reason == "Unschedulable"
    first = f"No node takes pods tickets-1-1, tickets-1-3: {FULL.rstrip('.')}"
    assert mark.message.startswith(f"{first}; No node takes pod tickets-1-2: {OTHER} Remedy: ")


def test_of_many_pods_it_names_some() -> None:
    run = a_run(status={"attempt": 1}, parallelism={"nodes": 8, "gpusPerNode": 0})
    plan = decide(seen(run, a_job(size=8), *(unplaced(index) for index in range(8))), NOW, SETTINGS)
    names = ", ".join(f"tickets-1-{index}" for index in range(5))
    assert plan.message.startswith(f"No node takes pods {names} and 3 more: {FULL}")


GAVE_UP = said("PeerLost", "only 3 of 4 nodes came within 1800 s")


@pytest.mark.parametrize(
    ("name", "pods", "want", "words"),
    [
        (
            "ranks that give up waiting for one without a node",
            (ended(0, 73, GAVE_UP), ended(1, 73, GAVE_UP), ended(2, 73, GAVE_UP), unplaced(3)),
            FailureClass.NOT_PLACED,
            f"3 of 4 pods had a node. No node takes pod tickets-1-3: {FULL.rstrip('.')}; tickets-1-0 says: only 3 of 4",
        ),
        (
            "ranks that give up waiting for one whose image is not there yet",
            (ended(0, 73, GAVE_UP), ended(1, 73, GAVE_UP), ended(2, 73, GAVE_UP), waiting(3, "ContainerCreating")),
            FailureClass.PEER_LOST,
            "only 3 of 4 nodes came within 1800 s; pod tickets-1-3 had not started: ContainerCreating",
        ),
        (
            "a rank that breaks while another has no node",
            (ended(0, 70, said("Internal")), ended(1, 73, GAVE_UP), ended(2, 73, GAVE_UP), unplaced(3)),
            FailureClass.INTERNAL,
            "it broke; pod tickets-1-3 had not started: 0/4 nodes",
        ),
        (
            "ranks that give up waiting for pods that a quota refuses",
            (ended(0, 73, GAVE_UP), ended(1, 73, GAVE_UP), ended(2, 73, GAVE_UP)),
            FailureClass.NOT_PLACED,
            f"3 of 4 pods had a node. 1 of 4 pods are not made: {QUOTA}",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_nothing_is_charged_while_a_peer_has_not_started(
    name: str, pods: tuple[PodView, ...], want: FailureClass, words: str
) -> None:
    observed = gang(*pods, chargedRestarts=3)
    refusal = Refusal(QUOTA, ago(30)) if "quota" in name else None
    observed = replace(observed, reports=Reports(failing_since=ago(SETTINGS.node_grace), refusal=refusal))
    plan = decide(observed, NOW, SETTINGS)
    assert plan.failed is not None, name
    failure = plan.failed.failure
    assert (failure.failure_class, plan.failed.charged, plan.phase) == (want, False, Phase.RESTARTING)
    assert failure.message.startswith(words)
    assert compute_status(observed.run, plan, Reports(), NOW).charged_restarts == 3


LATE = running(3)
INTERNAL = said("Internal", "it broke")


@pytest.mark.parametrize(
    ("others", "last", "began", "charged", "blamed"),
    [
        (GAVE_UP, LATE, 3, False, "tickets-1-0"),
        (GAVE_UP, LATE, 4, True, "tickets-1-3"),  # it ran from the beginning, and says nothing
        (GAVE_UP, ended(3, 73, GAVE_UP), 3, False, "tickets-1-0"),
        (INTERNAL, LATE, 3, False, "tickets-1-0"),
        (INTERNAL, ended(3, 70, INTERNAL), 3, True, "tickets-1-0"),  # whatever it is, it is not that one came late
    ],
)
def test_a_gang_that_was_not_whole_is_not_charged_though_the_last_peer_starts_in_the_end(
    others: str, last: PodView, began: int, charged: bool, blamed: str
) -> None:
    pods = (*(ended(index, 73, others) for index in range(3)), last)
    with_them = frozenset(pod.uid for pod in pods[:began])
    observed = replace(gang(*pods), reports=Reports(failing_since=ago(SETTINGS.node_grace), failing_with=with_them))
    plan = decide(observed, NOW, SETTINGS)
    assert plan.failed is not None
    assert (plan.failed.charged, plan.failed.failure.pod) == (charged, blamed)


def test_which_pods_had_begun_is_kept_from_the_first_failure_on() -> None:
    first = gang(ended(0, 73, GAVE_UP), running(1), running(2), unplaced(3))
    plan = decide(first, NOW, SETTINGS)
    assert plan.notes.failing
    heard = settle(first.reports, first, plan, NOW)
    assert heard.failing_with == {"pod-1-0", "pod-1-1", "pod-1-2"}
    second = replace(gang(ended(0, 73, GAVE_UP), *(running(index) for index in (1, 2, 3))), reports=heard)
    again = settle(heard, second, decide(second, NOW, SETTINGS), NOW)
    assert again.failing_with == heard.failing_with


def test_a_final_verdict_stays_final_while_a_peer_has_not_started() -> None:
    pods = (ended(0, 65, said("BadData")), ended(1, 73, GAVE_UP), ended(2, 73, GAVE_UP), unplaced(3))
    observed = replace(gang(*pods), reports=Reports(failing_since=ago(SETTINGS.node_grace)))
    assert decide(observed, NOW, SETTINGS).phase == Phase.FAILED


def test_looking_for_room_for_days_leaves_the_other_failures_on_record() -> None:
    observed = gang(running(0), *(unplaced(index) for index in (1, 2, 3)), since=60, failures=[failure(9, "Evicted")])
    run = observed.run
    for attempt in (1, 2, 3):
        again = replace(observed, run=run)
        plan = decide(again, NOW, SETTINGS)
        assert plan.failed is not None
        told = plan.failed.failure.model_copy(update={"attempt": attempt})
        plan = replace(plan, failed=replace(plan.failed, failure=told))
        run = run.model_copy(update={"status": compute_status(run, plan, Reports(), NOW)})
        run = run.model_copy(
            update={
                "status": run.status.model_copy(
                    update={
                        "attempt": 1,
                        "failures": [
                            one.model_copy(update={"attempt": one.attempt + 10}) for one in run.status.failures
                        ],
                    }
                )
            }
        )
    assert [str(one.failure_class) for one in run.status.failures] == ["Evicted", "NotPlaced"]
    assert run.status.recent_failures == 3


def test_words_that_are_too_long_for_a_status_are_cut() -> None:
    lost = said("PeerLost", "x" * 4000)
    pods = (ended(0, 73, lost), ended(1, 73, lost), ended(2, 73, lost), unplaced(3, "y" * 4000))
    observed = replace(gang(*pods), reports=Reports(failing_since=ago(SETTINGS.node_grace)))
    plan = decide(observed, NOW, SETTINGS)
    assert plan.failure is not None
    assert len(plan.failure.message) == 4096


DAY = 86_400.0
EVICTED = {**failure(1, "Evicted"), "at": stamp(ago(DAY))}
NO_ROOM = {**failure(2, "NotPlaced"), "at": stamp(ago(DAY / 2))}
BEFORE: dict[str, tuple[list[dict[str, Any]], int, float]] = {
    "nothing has failed": ([], 0, 60.0),
    "the Job was let in late": ([EVICTED], 1, DAY - 10),
    "the pause is no wait, as it is failing": ([EVICTED], 4, DAY - 80),
    "looking for room before is waiting, too": ([EVICTED, NO_ROOM], 2, DAY - 20),
    "only for room": ([NO_ROOM], 1, 60.0),
}


@pytest.mark.parametrize("name", BEFORE)
def test_time_without_a_job_is_time_that_is_waited(name: str) -> None:
    """A quota of Jobs may be full for a day: the first failure after that is no want of progress."""
    failures, count, waited = BEFORE[name]
    job = a_job(3, created=ago(60))
    status = {"attempt": 3, "phase": "Restarting", "failures": failures, "recentFailures": count}
    run = a_run(status={**status, "failingSince": stamp(ago(DAY))})
    gang = [running(index, 3) for index in (0, 1)]
    plan = decide(seen(run, job, *gang), NOW, Settings(preflight="off", restart_backoff=10.0))
    assert plan.waiting_since == ago(waited)
    assert compute_status(run, plan, Reports(), NOW).failing_since == min(NOW, ago(DAY - waited))


CUT_SHORT: dict[str, tuple[JobView | PodView, ...]] = {
    "one of it was evicted": (
        a_job(3, created=ago(60)), ended(0, 137, attempt=3, disruption="EvictionByEvictionAPI"), unplaced(1, attempt=3)
    ),
    "a kubelet refused one of it": (
        a_job(3, created=ago(60)), a_pod(0, 3, phase="Failed", reason="UnexpectedAdmissionError"),
        unplaced(1, attempt=3),
    ),
    "somebody is deleting its Job": (a_job(3, created=ago(60), deleting=True), unplaced(0, attempt=3)),
    "somebody deleted its Job": (),
}  # fmt: skip


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("name", CUT_SHORT)
def test_the_wait_of_a_gang_that_was_never_whole_is_no_want_of_progress(name: str, placed: bool) -> None:
    """One that was whole has it in its status."""
    conditions = [condition("Scheduled", "True" if placed else "False")]
    status = {"attempt": 3, "failures": [EVICTED, NO_ROOM], "recentFailures": 2, "conditions": conditions}
    run = a_run(status={**status, "failingSince": stamp(ago(DAY))})
    observed = seen(run, *CUT_SHORT[name], reports=Reports(run_uid="run-uid", failing_since=ago(90)))
    plan = decide(observed, NOW, Settings(preflight="off", restart_backoff=10.0))
    assert plan.failed is not None
    assert plan.ended is placed
    if not placed:
        assert plan.failed.budget is not None
        assert plan.failed.budget.since == ago(20), "the pause after the eviction, which was failing"
