"""What is read on top of the watches, and when."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_operator.controller.questions import forgotten_pods, unseen_ends
from lora_operator.diagnosis.firstseen import starting_seen
from lora_operator.diagnosis.silence import QUIET
from lora_operator.evidence.wants import REFUSAL_DELAY, compute_next_look, wants_events, wants_refusal
from lora_operator.settings import Settings
from lora_operator.state.plan import NOTHING
from lora_operator.state.reports import Refusal, Reports, hear_pod_events, hear_refusal
from lora_operator.watched.views import JobView, PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ago, condition, ended, seen, waiting

STARTED = {"attempt": 1, "phase": "Starting"}


@pytest.mark.parametrize(("stall", "log", "next_look"), [(600, 10.0, 10.0), (20, 60.0, 20.0)])
def test_a_gang_that_has_just_begun_is_looked_at_again_before_it_can_stall(
    stall: int, log: float, next_look: float
) -> None:
    """The status says so only after this look, and what this operator has written is no event to it."""
    run = a_run(status=STARTED, runPolicy={"stallTimeoutSeconds": stall})
    observed = seen(run, a_job(), a_pod(0, running=True), a_pod(1, running=True))
    assert compute_next_look(observed, NOTHING, Settings(log_interval=log)) == next_look


@pytest.mark.parametrize(
    ("parts", "asked", "next_look"),
    [
        pytest.param([a_job()], True, REFUSAL_DELAY, id="a Job without its pods is asked about, again and again"),
        pytest.param([a_job(started=None)], False, QUIET, id="but not one that the Job controller has not come to"),
        pytest.param([a_job(), a_pod(0), a_pod(1)], False, QUIET, id="nor one that has all of its pods"),
        pytest.param(
            [a_job(), *(a_pod(index, unscheduled_reason="Unschedulable") for index in (0, 1))],
            False,
            None,
            id="and where all is said an event will tell",
        ),
    ],
)
def test_why_pods_are_not_made_is_asked_only_of_a_controller_that_tries(
    parts: list[JobView | PodView], asked: bool, next_look: float | None
) -> None:
    observed = seen(a_run(status=STARTED), *parts)
    assert (wants_refusal(observed, NOW, Settings()) is not None) is asked
    assert compute_next_look(observed, NOTHING, Settings()) == next_look


@pytest.mark.parametrize(
    ("parts", "unseen"),
    [
        pytest.param([a_pod(0), a_pod(1)], True, id="the watch of pods is behind"),
        pytest.param([ended(0), a_pod(1)], True, id="the watch of pods is behind by one"),
        pytest.param([ended(0)], True, id="one was never seen"),
        pytest.param([ended(0), ended(1)], False, id="both were seen"),
        pytest.param([ended(0), a_pod(1, gone=True)], False, id="one was seen until it was gone"),
    ],
)
def test_pods_that_a_job_says_have_failed_are_looked_up_until_they_were_seen_to(
    parts: list[PodView], unseen: bool
) -> None:
    job = a_job(failed_indexes=frozenset({0, 1}))
    assert unseen_ends(seen(a_run(status=STARTED), job, *parts)) == (job if unseen else None)


@pytest.mark.parametrize(
    ("parts", "unseen"),
    [
        pytest.param([], True, id="rank 0 was never seen"),
        pytest.param([a_pod(0)], True, id="rank 0 was not seen to end"),
        pytest.param([ended(0, code=0)], False, id="the other has nothing to say"),
    ],
)
def test_what_rank_0_says_of_its_success_is_looked_up(parts: list[PodView], unseen: bool) -> None:
    job = a_job(completed_indexes=frozenset({0, 1}))
    assert unseen_ends(seen(a_run(status=STARTED), job, *parts)) == (job if unseen else None)


@pytest.mark.parametrize(
    ("status", "parts", "names"),
    [
        pytest.param(STARTED, [a_pod(0)], ["tickets-1-0"], id="its Job is gone"),
        pytest.param(STARTED, [a_job(), a_pod(0)], [], id="its Job is there"),
        pytest.param(STARTED, [a_pod(0, deleting_at=ago(5))], [], id="it is being deleted"),
        pytest.param(STARTED, [a_pod(0, gone=True)], [], id="it is known to be gone"),
        pytest.param({"conditions": [condition("Failed")]}, [a_pod(0)], [], id="the run has ended"),
    ],
)
def test_a_pod_is_forgotten_that_nobody_deletes_though_its_job_is_gone(
    status: dict[str, Any], parts: list[JobView | PodView], names: list[str]
) -> None:
    assert [pod.name for pod in forgotten_pods(seen(a_run(status=status), *parts))] == names


def test_the_events_of_all_pods_are_read_in_their_turns() -> None:
    """What keeps the seventh pod from starting may keep no other."""
    pods = [waiting(index, "ContainerCreating") for index in range(7)]
    reports = Reports(seen={starting_seen(pod): ago(60) for pod in pods})
    observed = seen(a_run(status=STARTED), a_job(size=7), *pods, reports=reports)
    settings, at, read = Settings(log_interval=10.0), NOW, []
    for _ in range(4):
        want = wants_events(observed, at, settings)
        assert want is not None
        read.append([pod.index for pod in want.pods])
        observed = replace(observed, reports=hear_pod_events(observed.reports, {pod.uid: "" for pod in want.pods}, at))
        assert wants_events(observed, at, settings) is None
        left = compute_next_look(observed, NOTHING, settings)
        assert left == (10.0 if len(read) < 3 else 30.0), "sooner while there are some of which nothing is known"
        at += timedelta(seconds=left)
    assert read == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


QUOTA, POLICY = 'pods "a" is forbidden: exceeded quota: few', 'pods "a" is forbidden: violates PodSecurity'
REFUSALS: dict[str, tuple[str | None, str | None, float | None]] = {
    "the first counts from now": (None, POLICY, 0.0),
    "the same again goes on": (POLICY, POLICY, 700.0),
    "so it does where another pod is named": (POLICY, POLICY.replace("a", "b", 1), 700.0),
    "a long wait for quota is none for a policy": (QUOTA, POLICY, 0.0),
    "nor the other way round": (POLICY, QUOTA, 0.0),
    "no refusal any more": (POLICY, None, None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_counts_from_the_first_of_its_kind(name: str) -> None:
    before, message, want = REFUSALS[name]
    reports = Reports(refusal=Refusal(before, ago(700)) if before else None)
    found = hear_refusal(reports, message, NOW)
    assert found.refusal_read_at == NOW
    assert found.refusal == (None if want is None else Refusal(str(message), ago(want)))
