"""What is read on top of the watches, and when."""

import pytest

from lora_operator.follow import REFUSAL_DELAY, compute_next_look, unseen_failures, wants_refusal
from lora_operator.plan import NOTHING
from lora_operator.settings import Settings
from lora_operator.views import JobView, PodView
from tests.unit.operator.builders import NOW, a_job, a_pod, a_run, ended, running, seen

STARTED = {"attempt": 1, "phase": "Starting"}


@pytest.mark.parametrize(
    ("parts", "asked", "next_look"),
    [
        pytest.param([a_job()], True, REFUSAL_DELAY, id="a Job without its pods is asked about, again and again"),
        pytest.param([a_job(taken=False)], False, None, id="but not one that the Job controller has not come to"),
        pytest.param([a_job(), a_pod(0), a_pod(1)], False, None, id="nor one that has all of its pods"),
    ],
)
def test_why_pods_are_not_made_is_asked_only_of_a_controller_that_tries(
    parts: list[JobView | PodView], asked: bool, next_look: float | None
) -> None:
    observed = seen(a_run(status=STARTED), *parts)
    assert (wants_refusal(observed, NOW, Settings()) is not None) is asked
    assert compute_next_look(observed, NOTHING, Settings()) == next_look


FAILED = a_job(failed_indexes=frozenset({0, 1}), failure="FailedIndexes: ", finished=True)


@pytest.mark.parametrize(
    ("pods", "asked"),
    [
        pytest.param([], True, id="pods that nobody has seen"),
        pytest.param([ended(0), running(1)], True, id="a pod that was last seen running"),
        pytest.param([ended(0), a_pod(1)], True, id="a pod that was last seen waiting"),
        pytest.param([ended(0), ended(1)], False, id="pods whose ends were seen"),
        pytest.param([ended(0), running(1, gone=True)], False, id="a pod that is known to be gone"),
    ],
)
def test_pods_are_looked_up_that_have_failed_by_the_word_of_their_job_alone(pods: list[PodView], asked: bool) -> None:
    """Their last words decide what follows: without them a run with bad data is restarted."""
    observed = seen(a_run(status=STARTED), FAILED, *pods)
    assert (unseen_failures(observed) is FAILED) is asked
    assert unseen_failures(seen(a_run(status={**STARTED, "suspendedAttempt": 1}), FAILED, *pods)) is None
